"""Speech decoding: which of many stretches of sound was heard during a window of brain signal.

    task = SpeechDecoding(model="simple_conv_base", options={"subjects": 27})
    scores = candidate_scores(encoded.tokens, bank)      # [N, T, F], [M, T, F] → [N, M], for `zoo.evaluate.retrieval`

Source: Défossez et al., 2208.12266, §2.2: the predicted features of a window are multiplied with those of every stretch
of sound in the batch, each brought to length one, and softmax over stretches must choose the one that was heard. There
is no temperature, and no loss the other way. Rows of the batch with the same sound (`segment`) do not count as wrong
answers; the authors' code lets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Float, Int

from zoo.encoders.encoder import Encoder
from zoo.errors import ZooError
from zoo.objectives.contrast import candidate_scores, info_nce, retrieval
from zoo.objectives.stimulus import StimulusTask
from zoo.types import AnyArray, Array, Sensors


@dataclass(frozen=True)
class SpeechDecoding(StimulusTask):
    """The task; targets are the sound's features [B, T, F] at the signal's rate.

    Attributes:
        model: registered encoder whose tokens are samples and have F features
    """

    model: str = "simple_conv_tiny"

    def module(self, target: AnyArray) -> SpeechDecodingModel:
        return SpeechDecodingModel(self.encoder())


class SpeechDecodingModel(nn.Module):
    """(loss; metrics: share of windows whose sound is first, and among ten, of the batch)."""

    encoder: Encoder

    @nn.compact
    def __call__(
        self,
        signal: Float[AnyArray, "B C T"],
        sensors: Sensors,
        target: Float[AnyArray, "B T F"],
        *,
        segment: Int[AnyArray, " B"] | None = None,
        subject: Int[AnyArray, " B"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, ""], Mapping[str, Array]]:
        tokens = self.encoder(signal, sensors, subject=subject, train=train).tokens
        if tokens.shape != target.shape:
            raise ZooError(
                f"SpeechDecoding: got features of sound {list(target.shape)}, the encoder predicts {list(tokens.shape)}"
            )
        scores = candidate_scores(tokens, target)
        metrics = {"top1": retrieval(scores), "top10": retrieval(scores, top=10)}
        return info_nce(scores, segment=segment), metrics
