"""MuJoCo's arm, observed by its tip: position and goal in the order of the point mazes."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from numpy.typing import NDArray

__all__ = ["ReacherTipEnv"]


class ReacherTipEnv(ReacherEnv):
    """gymnasium's Reacher-v5 with a state that does not depend on the target.

    Arm, torques, starts and targets are those of Reacher-v5. But that task observes the vector from
    the tip to the target, which is neither a state of the arm nor constant in an episode.

    ============  =====================================================================
    observation   ``[10]`` float64: the tip's ``x, y`` (m), cosines of shoulder and elbow, their
                  sines, their speeds (rad/s), the target's ``x, y`` (m)
    action        ``[2]`` in ``[-1, 1]``: torques of shoulder and elbow, held for 0.02 s
    reward        ``exp(-distance of tip and target / 0.1 m)``, without a torque cost
    success       whether the tip is within 2 cm of the target
    end           never terminates; the task's time limit truncates
    ============  =====================================================================

    Args:
        **kwargs: ``render_mode`` and others of ``ReacherEnv``.
    """

    def _get_obs(self) -> NDArray[np.float64]:
        there = super()._get_obs()
        tip = self.get_body_com("fingertip")[:2]
        return np.concatenate([tip, there[:4], there[6:8], there[4:6]])

    def _get_rew(self, action: NDArray[np.float32]) -> tuple[float, dict[str, Any]]:
        _, info = super()._get_rew(action)
        away = (self.get_body_com("fingertip") - self.get_body_com("target"))[:2]
        distance = float(np.linalg.norm(away))
        return float(np.exp(-distance / 0.1)), info | {"success": distance <= 0.02}
