"""Will it fit, how fast could it be: the training step compiled ahead for chips that are not there.

`zoo plan CONFIG --target v5p:8x8x8` is `zoo.plan.plan`. `chips` says what chips can do, `target` makes their mesh,
`count` counts the step's operations, `collectives` reads what the compiled program sends between them.
"""
