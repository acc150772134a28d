"""Wrong input to every command: exit code 2, one line on standard error that says what to do, nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qdeploy.cli import main

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "models" / "fashion-resnet8.toml"
RUN = REPOSITORY / "models" / "fashion-resnet8"

WRONG = """
--nope                                                    | No such option
trian                                                     | Did you mean 'train'
keys inti                                                 | Did you mean 'init'
train                                                     | Missing argument 'RECIPE'
train absent.toml -o r                                    | cannot read the recipe absent.toml
train junk.bin -o r                                       | junk.bin is not valid TOML
train RECIPE                                              | Missing option '-o' / '--out'
train RECIPE -o r --threads 0                             | '--threads'
train RECIPE -o r --data-dri x                            | Did you mean '--data-dir'
train RECIPE -o r --only absent.json                      | absent.json
train RECIPE -o file.txt/r                                | file.txt
train empty.toml -o r                                     | the recipe lacks network
subnet absent --bits 2 -o s                               | absent is not a run folder
subnet RUN --bits two -o s                                | '--bits'
subnet RUN -o s                                           | choose one of --bits
subnet RUN --bits 2 -o full                               | not empty
subnet RUN --bits 2 -o file.txt                           | file.txt is a file
evaluate RUN -o scores                                    | Missing option '--specs'
evaluate RUN --specs absent.jsonl -o scores               | absent.jsonl
evaluate RUN --specs junk.bin -o scores --processes 0     | '--processes'
evaluate absent --specs junk.bin -o scores                | junk.bin
space absent                                              | absent is not a run folder
space RUN --sample 3                                      | --sample and --out go together
space RUN --sample 3 -o file.txt                          | --force
fetch imagenet -o d                                       | 'fashion-mnist'
quantize absent.onnx --data full -o q.onnx                | absent.onnx
quantize junk.bin --data full -o q.onnx                   | junk.bin
quantize junk.bin -o q.onnx                               | Missing option '--data'
quantize junk.bin --data full -o q.onnx --bits 9          | '--bits'
quantize junk.bin --data full -o q.onnx --calibration no  | '--calibration'
quantize junk.bin --data full -o q --ladder 2             | has one level
quantize junk.bin --data full -o q --ladder 2,4 --bits 4  | --ladder gives the widths itself
quantize junk.bin --data full -o q --weights w.pt         | --weights belongs to a torch network
quantize no.module:make --data full -o q --shape x=1,2    | cannot be imported
quantize junk.bin --data full -o q --mean 1,a             | is no list of numbers
sensitivity junk.bin --data full -o s --widths 2,x        | is no list of widths
export absent -o m.onnx                                   | absent
export full -o m.onnx                                     | frozen
bundle -o tree                                            | Missing argument 'LEVELS...'
bundle absent.onnx -o tree                                | absent.onnx
bundle junk.bin -o tree                                   | junk.bin
bundle junk.bin --release 0 -o tree                       | '--release'
inspect absent                                            | absent
inspect junk.bin                                          | junk.bin
targets here                                              | unexpected extra argument
compile junk.bin -o a                                     | give --target FILE, or --isa auto
compile absent.onnx --target host -o a                    | absent.onnx
compile junk.bin --target host -o a                       | junk.bin
compile junk.bin --target no-such -o a                    | no shipped target is named no-such
compile junk.bin --target host -o a --threads 0           | '--threads'
compile junk.bin --target host -o a --tune -1             | '--tune'
compile junk.bin --target host -o a --shape nonsense      | nonsense
profile full --model junk.bin                             | junk.bin
profile full                                              | Missing option '--model'
package full --target host -o p.tar.gz                    | full
package full --target empty.toml -o p.tar.gz              | empty.toml
devices --tracker nonsense                                | nonsense
latency-table absent --target host -o l.sqlite            | absent
latency-table RUN --target host -o l --export x.txt       | name a .json or a .csv file
latency-table RUN --target host -o l --device nonsense    | nonsense
search absent --objective accuracy -o f                   | absent
search RUN --objective accuracy -o f --population 1       | '--population'
search RUN --objective accuracy                           | Missing option '-o' / '--out'
pick absent -o best.json                                  | absent
pick absent -o file.txt                                   | --force
report absent -o page.html                                | absent
report full -o file.txt                                   | --force
keys init k --root 3/2                                    | is no quorum
keys init full                                            | not empty
keys rotate --keys absent --role root                     | absent
keys rotate --keys absent --role king                     | '--role'
publish absent --to site --keys absent                    | absent
publish full --to site --keys absent --canary 0%          | whole number of per cent
publish full --to site --keys absent --days 0             | '--days'
publish full --to site --keys absent --level w4           | write CLASS=LEVEL
rollout site --keys absent --promote                      | absent
refresh site --keys absent                                | absent
serve absent                                              | absent
serve full --port 70000                                   | '--port'
fleet absent.sqlite                                       | absent.sqlite
pull http://127.0.0.1:1                                   | give at least one URL and the device folder
pull ftp://host d --unsigned                              | is not a URL
pull http://127.0.0.1:1 d                                 | has no root of trust yet
pull http://127.0.0.1:1 d --rate 0                        | '--rate'
pull http://127.0.0.1:1 d --root junk.bin --unsigned      | exclude each other
pull http://127.0.0.1:1 d --root absent.json              | absent.json
pull http://127.0.0.1:1 d --channel beta --unsigned       | '--channel'
climb absent --to w4                                      | absent is no device folder
climb absent --to w4 --dry-run                            | absent
climb absent                                              | Missing option '--to'
drop absent --to w2                                       | absent
evict absent                                              | absent is no device folder
evict absent --dry-run                                    | absent
run absent --images images.npy                            | absent
run absent --images images.npy --runtime gpu              | '--runtime'
doctor here                                               | unexpected extra argument
init mine                                                 | Missing option '--data'
init mine --data absent                                   | absent is no folder of images
init mine --data full                                     | full holds no images
init mine --data one                                      | images of one class
init mine --data images.npz --size 3                      | write height and width
init mine --data images.npz --network vgg                 | choose one of
init mine --data images.npz --classes 0,7                 | has no class '7'
init mine --data images.npz --classes 0                   | two classes or more
"""

ROWS = [[part.strip() for part in line.split("|")] for line in WRONG.strip().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with something wrong of every kind."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "junk.bin").write_bytes(bytes(range(128, 228)))
    (folder / "file.txt").write_text("keep me")
    (folder / "empty.toml").write_text("")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("keep me")
    (folder / "one" / "cats").mkdir(parents=True)
    (folder / "one" / "cats" / "1.png").write_bytes(b"not read yet")
    np.save(folder / "images.npy", np.zeros((2, 1, 28, 28), np.uint8))
    np.savez(folder / "images.npz", images=np.zeros((400, 4, 4), np.uint8), labels=np.arange(400) % 2)
    return folder


def test_there_is_a_wrong_input_for_every_command() -> None:
    named = {row[0].split()[0] for row in ROWS}
    assert set(main.commands) - named <= {"demo"}  # which takes none
    assert len(ROWS) >= 60


@pytest.mark.parametrize(("line", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_one_line_and_exit_code_2(world: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str) -> None:
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    arguments = [{"RECIPE": str(RECIPE), "RUN": str(RUN)}.get(word, word) for word in line.split()]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("qdeploy: "), result.stderr
    assert expected in result.stderr
    assert sorted(world.rglob("*")) == before, "something was left behind"
