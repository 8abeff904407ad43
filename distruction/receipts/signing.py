"""Ed25519 signatures (RFC 8032) by the ``cryptography`` package, with keys in PEM files as openssl makes them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import UsageError
from ..extras import needed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM = "Ed25519"


def _package() -> Any:
    with needed("receipt", "a signature"):
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    return ed25519, serialization


def read_private(path: Path) -> "Ed25519PrivateKey":
    """The private key in a PEM file, such as ``openssl genpkey -algorithm ed25519 -out key.pem`` writes.

    Raises:
        MissingPackage: ``cryptography`` is not installed.
        UsageError: the file holds no Ed25519 key that can be read without a password.
    """
    ed25519, serialization = _package()
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read as a private key: {error}; make one by openssl genpkey -algorithm ed25519"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(
            f"{path} holds a key of another kind than Ed25519; openssl genpkey -algorithm ed25519 makes one"
        )
    return cast("Ed25519PrivateKey", key)


def read_public(path: Path) -> bytes:
    """The 32 bytes of the public key in a PEM file (``openssl pkey -in key.pem -pubout``).

    Raises:
        MissingPackage: ``cryptography`` is not installed.
        UsageError: the file holds no public Ed25519 key.
    """
    ed25519, serialization = _package()
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as a public key: {error}; openssl pkey -in key.pem -pubout writes one"
        ) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{path} holds a key of another kind than Ed25519")
    raw: bytes = key.public_bytes_raw()
    return raw


def public_of(key: "Ed25519PrivateKey") -> bytes:
    """The 32 bytes of the public key that belongs to a private one."""
    return key.public_key().public_bytes_raw()


def sign(key: "Ed25519PrivateKey", message: bytes) -> bytes:
    """The signature, 64 bytes (RFC 8032, section 5.1.6)."""
    return key.sign(message)


def is_signed(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the signature is that of ``message`` by the private key of ``public``.

    Raises:
        MissingPackage: ``cryptography`` is not installed.
    """
    ed25519, _ = _package()
    with needed("receipt", "a signature"):
        from cryptography.exceptions import InvalidSignature

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
