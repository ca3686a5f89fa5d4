"""Kill runs at random moments: `make soak`, or `python -m tests.soak --rounds 500 --seed 0`.

A round starts a run in an empty folder and kills it with SIGKILL at a random moment. It resumes
and kills the run up to five times, then lets it finish. After each kill, every visible part must be
whole. At the end the table must equal the table of an undisturbed run, without missing or repeated
ids and without temporary files.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.test_durability import Setting


def soak(setting: Setting, folder: Path, *, rounds: int, seed: int) -> int:
    """Run the rounds and return the number of killed runs.

    Raises:
        AssertionError: A round failed. Its folder is kept.
    """
    from tests.test_durability import check_parts

    rng = random.Random(seed)
    began = time.monotonic()
    assert setting.run(folder / "timing")[0] == 0
    run_s = time.monotonic() - began
    kills = 0
    for number in range(rounds):
        output = folder / f"round-{number}"
        for _ in range(rng.randint(1, 5)):
            child = setting.start(output, "--batch-size", str(rng.choice([1, 3, 16])))
            time.sleep(rng.uniform(0, run_s))
            child.send_signal(signal.SIGKILL)
            code = child.wait()
            assert code in (0, -signal.SIGKILL), (number, code, child.stderr)
            kills += code != 0
            if output.exists():
                check_parts(output)
            if code == 0:
                break
        began = time.monotonic()
        code, child = setting.run(output)
        # follow the load of the machine
        run_s = (run_s + time.monotonic() - began) / 2
        assert code == 0, (number, child.stderr)
        setting.check_complete(output)
        shutil.rmtree(output)
    return kills


def main() -> None:
    """Run rounds as the command line says and print one JSON object."""
    from tests.conftest import random_model, save_tokenizer
    from tests.launcher import Launcher
    from tests.test_durability import ROWS, Setting

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with Launcher() as launcher, tempfile.TemporaryDirectory() as work:
        checkpoint = Path(work) / "model"
        random_model().save_pretrained(checkpoint)
        save_tokenizer(checkpoint)
        began = time.monotonic()
        setting = Setting(launcher, checkpoint, Path(work), ROWS)
        kills = done = 0
        while done < args.rounds:
            count = min(50, args.rounds - done)
            folder = Path(work) / str(done)
            kills += soak(setting, folder, rounds=count, seed=args.seed + done)
            done += count
            print(f"{done} rounds, {kills} kills, {time.monotonic() - began:.0f} s", flush=True)
    print(json.dumps({"rounds": done, "kills": kills, "failures": 0}))


if __name__ == "__main__":
    main()
