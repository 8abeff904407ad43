"""Receipts: against the published vectors of their parts, and whole ones with one byte changed anywhere."""

import json
import os
import stat
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distruction import Posterior, UsageError, cli, models, receipts
from distruction.data import load
from distruction.data.requests import in_memory
from distruction.files import load_tensors, save_tensors
from distruction.receipts import canonical, merkle, signing
from distruction.receipts.receipt import parse
from distruction.receipts.records import record_digest

# --- parts against published vectors -------------------------------------------------------------

# The reference leaves, roots and a path of Certificate Transparency's own tests of RFC 6962's tree.
LEAVES = [
    bytes.fromhex(t)
    for t in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
PATH_OF_FIRST = [
    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
]


@pytest.mark.parametrize("size", range(9))
def test_the_tree_is_that_of_certificate_transparency(size):
    assert merkle.root([merkle.leaf_hash(d) for d in LEAVES[:size]]).hex() == ROOTS[size]


def test_a_proof_is_that_of_certificate_transparency():
    tree = merkle.levels([merkle.leaf_hash(d) for d in LEAVES])
    assert [h.hex() for h in merkle.proof(tree, 0)] == PATH_OF_FIRST


def defined(leaves):
    """MTH as RFC 6962 defines it, by its recursion."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1 << ((len(leaves) - 1).bit_length() - 1)
    return merkle._node(defined(leaves[:k]), defined(leaves[k:]))


@pytest.mark.parametrize("size", [*range(1, 18), 31, 33])
def test_each_proof_leads_to_the_root_and_to_no_other_place(size):
    leaves = [merkle.leaf_hash(bytes([i])) for i in range(size)]
    tree, root = merkle.levels(leaves), merkle.root(leaves)
    assert root == defined(leaves)
    for i, leaf in enumerate(leaves):
        path = merkle.proof(tree, i)
        assert merkle.leads_to(root, leaf, i, size, path)
        assert not any(merkle.leads_to(root, leaf, j, size, path) for j in range(size) if j != i)
        assert not merkle.leads_to(root, merkle.leaf_hash(b"another"), i, size, path)
        assert not merkle.leads_to(root, leaf, i, size, [*path, root])
        assert not merkle.leads_to(root, leaf, i, size, path[:-1]) or size == 1


# RFC 8032, section 7.1: secret key, public key, message, signature.
ED25519 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The key files of RFC 8032's first two tests."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization as form

    folder = tmp_path_factory.mktemp("keys")
    for number, (secret, *_) in enumerate(ED25519):
        key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
        (folder / f"key{number}").write_bytes(
            key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        )
        (folder / f"pub{number}").write_bytes(
            key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        )
    return folder


@pytest.mark.parametrize("number", range(len(ED25519)))
def test_signatures_are_those_of_rfc_8032(keys, number):
    _, public, message, signature = (bytes.fromhex(t) for t in ED25519[number])
    key = signing.read_private(keys / f"key{number}")
    assert signing.public_of(key) == signing.read_public(keys / f"pub{number}") == public
    assert signing.sign(key, message) == signature
    assert signing.is_signed(public, message, signature)
    assert not signing.is_signed(public, message + b"x", signature)
    assert not signing.is_signed(bytes.fromhex(ED25519[1 - number][1]), message, signature)


def test_names_are_sorted_as_in_rfc_8785():
    names = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    text = canonical.encode(dict.fromkeys(names, 1)).decode()
    assert list(json.loads(text)) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    # RFC 8785, section 3.2.2.2.
    assert canonical.encode('\u20ac$\u000f\nA\'B"\\\\"/') == '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'.encode()


@pytest.mark.parametrize("value", [0.5, float("nan"), 2**53, {1: 2}, "\ud800", b"x"])
def test_what_has_no_one_spelling_is_refused(value):
    with pytest.raises(UsageError):
        canonical.encode(value)


@given(st.floats(allow_nan=False))
def test_a_real_number_is_read_back_as_it_was(value):
    assert float(json.loads(canonical.encode(canonical.plain({"x": value})))["x"]) == value


# --- whole receipts ------------------------------------------------------------------------------


def run(*words):
    """The status of the command line."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["distruction", *map(str, words)])
    with pytest.raises(SystemExit) as stop, patch.context():
        cli.main()
    patch.undo()
    return stop.value.code


@pytest.fixture(scope="module")
def made(tmp_path_factory, keys):
    """A request with its report, a signed receipt, and what it speaks of."""
    folder = tmp_path_factory.mktemp("receipt")
    torch.manual_seed(0)
    config = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}
    model = models.create(**config)
    models.save(model, folder / "model", {**config, "data": "digits"})
    Posterior.around(model, 0.05).save(folder / "posterior")
    (folder / "rows").write_text("5\n900\n17\n3\n1200\n")
    status = run(
        "forget", "--model", folder / "model", "--posterior", folder / "posterior", "--out", folder / "unlearned",
        "--records", folder / "rows", "--steps", 2, "--kl-weight", 0.3, "--no-progress",
        "--posterior-out", folder / "left", "--report", folder / "report",
        "--receipt", folder / "receipt.json", "--key", keys / "key0",
    )  # fmt: skip
    assert status == 0
    return folder


def verify(made, *more, receipt=None):
    return run("verify", receipt or made / "receipt.json", "--no-progress", *more)


def everything(made, keys):
    return (
        "--model", made / "unlearned", "--posterior", made / "posterior", "--original-model", made / "model",
        "--posterior-after", made / "left", "--secret", made / "receipt.secret.json", "--records", made / "rows",
        "--public-key", keys / "pub0",
    )  # fmt: skip


def test_a_true_receipt_is_accepted_and_the_run_gives_the_same_bits(made, keys, capsys):
    assert verify(made, *everything(made, keys), "--replay") == 0
    out = capsys.readouterr().out
    assert out.count(": ok") == 8
    assert "the same bits after 2 steps" in out
    assert "not checked" not in out


def test_a_replay_that_differs_is_rejected_on_the_same_machine_and_measured_on_another(made, capsys, tmp_path, keys):
    receipt = json.loads((made / "receipt.json").read_text())
    del receipt["sha256"], receipt["signature"]
    receipt["signer"] = None

    def issued(**changes):
        """The receipt of somebody who lies."""
        import hashlib

        body = {**receipt, **changes}
        body["sha256"] = hashlib.sha256(canonical.encode(body)).hexdigest()
        receipts.write(tmp_path / "r.json", {**body, "signature": None})
        return verify(
            made, "--posterior", made / "posterior", "--original-model", made / "model", "--model", made / "unlearned",
            "--records", made / "rows", "--secret", made / "receipt.secret.json", "--replay",
            receipt=tmp_path / "r.json",
        )  # fmt: skip

    assert issued() == 0
    assert issued(method={**receipt["method"], "seed": receipt["method"]["seed"] + 1}) == 3
    assert "other bits on the same machine" in capsys.readouterr().out
    elsewhere = {"machine": {**receipt["machine"], "cpu": "another"}}
    method = {**receipt["method"], "data_per_step": "1.0"}
    assert issued(**elsewhere, method=method) == 3
    assert "differing: cpu" in capsys.readouterr().out


def flipped(path, target, position, change=1):
    content = bytearray(path.read_bytes())
    content[position] ^= change
    target.write_bytes(content)
    return target


ANYWHERE = st.floats(0, 1, exclude_max=True)


@settings(max_examples=25, deadline=None)
@given(where=ANYWHERE, change=st.integers(1, 255))
@pytest.mark.parametrize(
    ("role", "name"),
    [("model_after", "unlearned"), ("model_before", "model"), ("posterior_before", "posterior"),
     ("posterior_after", "left")],
)  # fmt: skip
def test_a_changed_byte_of_a_file_is_found(made, tmp_path_factory, role, name, where, change):
    from distruction.receipts import checks

    receipt = receipts.read(made / "receipt.json")
    assert checks.file(receipt, role, made / name, "").holds
    position = int(where * (made / name).stat().st_size)
    changed = flipped(made / name, tmp_path_factory.getbasetemp() / "changed", position, change)
    assert checks.file(receipt, role, changed, "").holds is False


def test_a_changed_byte_of_the_receipt_is_found_wherever_it_is(made, tmp_path):
    content = (made / "receipt.json").read_bytes()
    accepted = []
    for position in range(len(content)):
        # Upper case for lower case of a letter, in signature and hashes too; in other places another digit or sign.
        change = 0x20 if chr(content[position]).isalpha() else 0x01
        changed = bytearray(content)
        changed[position] ^= change
        try:
            parse(bytes(changed))
        except receipts.Rejected:
            continue
        accepted.append(position)
    assert accepted == []
    for cut in (content[:-1], content + b"\n", b"", content[:100]):
        (tmp_path / "r").write_bytes(cut)
        with pytest.raises(receipts.Rejected):
            receipts.read(tmp_path / "r")


@settings(max_examples=100, deadline=None)
@given(where=ANYWHERE, change=st.integers(1, 255))
def test_any_change_of_a_byte_of_the_receipt_is_found(made, where, change):
    changed = bytearray((made / "receipt.json").read_bytes())
    changed[int(where * len(changed))] ^= change
    with pytest.raises(receipts.Rejected):
        parse(bytes(changed))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_changed_byte_of_a_record_is_found(made, data):
    from distruction.receipts import checks
    from distruction.receipts.receipt import read_secret

    receipt = receipts.read(made / "receipt.json")
    secret = read_secret(made / "receipt.secret.json", receipt)
    selection = in_memory(load("digits")[0], records=made / "rows")
    digests = receipts.selected(selection)
    assert checks.forget_set(receipt, digests, secret).holds
    assert checks.forget_set(receipt, digests[::-1], secret).holds  # a set has no order
    which = data.draw(st.integers(0, len(digests) - 1))
    pixels = bytearray(selection.images.images[which].numpy().tobytes())
    name = selection.classes[selection.labels[which]]
    shape = selection.images.images.shape[1:]
    assert record_digest(bytes(pixels), label=name, kind="pixels", shape=shape) == digests[which]
    proof = receipts.Tree(digests, secret).proof(digests[which])
    assert checks.record(receipt, digests[which], proof).holds
    pixels[data.draw(st.integers(0, len(pixels) - 1))] ^= data.draw(st.integers(1, 255))
    changed = record_digest(bytes(pixels), label=name, kind="pixels", shape=shape)
    others = [changed if i == which else d for i, d in enumerate(digests)]
    assert checks.forget_set(receipt, others, secret).holds is False
    assert checks.record(receipt, changed, proof).holds is False
    relabelled = record_digest(selection.images.images[which].numpy().tobytes(), label="x", kind="pixels", shape=shape)
    assert checks.record(receipt, relabelled, proof).holds is False


def test_more_or_fewer_records_or_another_secret_are_found(made):
    from distruction.receipts import checks
    from distruction.receipts.receipt import read_secret

    receipt = receipts.read(made / "receipt.json")
    secret = read_secret(made / "receipt.secret.json", receipt)
    digests = receipts.selected(in_memory(load("digits")[0], records=made / "rows"))
    for others in (digests[1:], [*digests, digests[0]], []):
        assert checks.forget_set(receipt, others, secret).holds is False
    assert checks.forget_set(receipt, digests, bytes(32)).holds is False
    assert (made / "receipt.secret.json").stat().st_mode & 0o777 == 0o600
    assert secret.hex() not in (made / "receipt.json").read_text()


def test_a_leaf_tells_nothing_without_the_secret():
    """Equal records have other leaves under another secret, and copies of one have other leaves."""
    record = record_digest(b"x", label="a", kind="file")
    roots = {receipts.Tree([record] * n, bytes([s]) * 32).root for n in (1, 2) for s in (0, 1)}
    assert len(roots) == 4
    tree = receipts.Tree([record, record], bytes(32))
    assert tree._levels[0][0] != tree._levels[0][1]


def test_the_wrong_key_is_found(made, keys, tmp_path, capsys):
    assert verify(made, "--public-key", keys / "pub1") == 3
    assert "signature: DIFFERS" in capsys.readouterr().out
    assert verify(made) == 0
    assert "whose it is: pass --public-key" in " ".join(capsys.readouterr().out.split())
    # A receipt that somebody else issued and signed is whole, and yet not of the trusted key.
    receipt = json.loads((made / "receipt.json").read_text())
    receipt["signer"]["public_key"] = ED25519[1][1]
    receipts.write(tmp_path / "r.json", receipt)
    assert verify(made, receipt=tmp_path / "r.json") == 2
    for wrong in (keys / "key0", tmp_path / "none"):
        assert verify(made, "--public-key", wrong) == 2
        assert "cannot be read as a public key" in capsys.readouterr().err


def test_verify_says_what_was_changed_and_ends_with_status_3(made, tmp_path, capsys):
    state, facts = load_tensors(made / "unlearned", format=models.FORMAT)
    state["head.bias"][0] += 1
    facts.pop("format", None)
    save_tensors(tmp_path / "other", state, format=models.FORMAT, facts=facts)
    assert verify(made, "--model", tmp_path / "other") == 3
    assert "model after: DIFFERS" in capsys.readouterr().out


def test_a_request_is_refused_before_it_runs_where_its_papers_cannot_be_written(made, keys, tmp_path, capsys):
    common = ("forget", "--model", made / "model", "--posterior", made / "posterior", "--out", tmp_path / "u",
              "--records", made / "rows", "--steps", 2, "--kl-weight", 0.3, "--no-progress")  # fmt: skip
    for more, message in (
        (("--receipt", made / "receipt.json"), "exists"),
        (("--report", made / "report"), "exists"),
        (("--key", keys / "key0"), "name its file by --receipt"),
        (("--receipt", tmp_path / "r.txt"), "call it r.json"),
        (("--receipt", tmp_path / "r.json", "--key", keys / "pub0"), "cannot be read as a private key"),
        (("--receipt", tmp_path / "no" / "r.json"), "does not exist"),
    ):
        assert run(*common, *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert os.listdir(tmp_path) == []


def test_an_image_is_shown_to_have_been_in_the_set_by_a_proof_alone(tmp_path, capsys):
    """A folder of image files: the proof for one is made with the secret and checked without it."""
    from PIL import Image

    torch.manual_seed(0)
    images, _ = load("digits")
    for name in ("3", "8"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, picture in enumerate(images.images[images.members(name)][:4]):
            Image.fromarray(picture[0].numpy() * 15).save(tmp_path / "photos" / name / f"{i}.png")
    config = {"name": "vit-micro", "num_classes": 2, "in_chans": 1, "img_size": 8}
    model = models.create(**config)
    facts = {"channels": 1, "side": 8, "mean": [100.0], "std": [80.0]}
    models.save(model, tmp_path / "m", {**config, "data": ".", "classes": ["3", "8"], "images": facts})
    Posterior.around(model, 0.05).save(tmp_path / "p")
    words = ("--data", tmp_path / "photos", "--workers", 0, "--no-progress")
    assert run(
        "forget", "--model", tmp_path / "m", "--posterior", tmp_path / "p", "--out", tmp_path / "u", "--class", 3,
        "--receipt", tmp_path / "r.json", "--steps", 1, "--kl-weight", 0.3, "--report", tmp_path / "page.html",
        "--no-records", *words,
    ) == 0  # fmt: skip
    one = ("--record", tmp_path / "photos" / "3" / "2.png", "--class", 3)
    receipt = ("verify", tmp_path / "r.json")
    made = ("--secret", tmp_path / "r.secret.json", "--prove", tmp_path / "proof.json", "--model", tmp_path / "u")
    assert run(*receipt, *one, *made, *words) == 0
    capsys.readouterr()
    assert run(*receipt, *one, "--proof", tmp_path / "proof.json") == 0
    assert "record: ok (in the forget set)" in capsys.readouterr().out
    other = ("--record", tmp_path / "photos" / "3" / "1.png", "--class", 3)
    assert run(*receipt, *other, "--proof", tmp_path / "proof.json") == 3
    assert run(*receipt, "--record", tmp_path / "photos" / "3" / "2.png", "--class", 8, "--proof",
               tmp_path / "proof.json") == 3  # fmt: skip
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert set(proof) == {"format", "index", "size", "salt", "path"}
    assert "data:image" not in (tmp_path / "page.html").read_text()
    (tmp_path / "photos" / "3" / "0.png").unlink()
    assert run(*receipt, "--secret", tmp_path / "r.secret.json", "--model", tmp_path / "u", *words) == 3


def test_nobody_else_can_read_a_secret_from_the_moment_it_has_its_name(tmp_path, monkeypatch):
    from distruction.receipts.receipt import write_secret

    modes, rename = [], os.replace

    def watched(old, new):
        modes.append(stat.S_IMODE(os.stat(old).st_mode))
        rename(old, new)

    monkeypatch.setattr(os, "replace", watched)
    write_secret(tmp_path / "secret.json", bytes(32), "0" * 64)
    assert modes == [0o600] == [stat.S_IMODE((tmp_path / "secret.json").stat().st_mode)]
