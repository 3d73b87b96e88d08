//! ed25519 signatures of records (RFC 8032), so that a remote that many can write to is believed
//! only where somebody trusted signed.
//!
//! A signed record carries `"signature": {"key": …, "value": …}` beside its other members; what is
//! signed is [`CONTEXT`] and the canonical JSON of all the others, known to this version or not.

use aws_lc_rs::rand;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde_json::{Value, json};

use super::config::{hex, unhex};
use super::{NewKey, PublicKey, RemoteError, Settings};
use crate::fingerprint::canonical;

/// Starts every signed message, so that a signature means nothing elsewhere.
const CONTEXT: &str = "pipe record v1\n";
/// Starts the text of a private key.
const PRIVATE: &str = "pipe-ed25519-private:";
/// Holds the text of a private key, for CI; goes before `sign`.
const VARIABLE: &str = "PIPE_SIGN_KEY";

/// Makes a key pair.
///
/// # Errors
/// [`RemoteError::Config`] where the system has no randomness.
pub fn new_key() -> Result<NewKey, RemoteError> {
    let no_random = |_| RemoteError::config("no randomness to be had", "try again");
    let mut seed = [0; 32];
    rand::fill(&mut seed).map_err(no_random)?;
    let private = format!("{PRIVATE}{}\n", hex(&seed));
    let public = public_key(&private)?;
    Ok(NewKey { private, public })
}

/// The public half of a private key's text.
///
/// # Errors
/// [`RemoteError::Config`] for a text that is no key.
pub fn public_key(private: &str) -> Result<PublicKey, RemoteError> {
    let signer = Signer::parse(private)?;
    Ok(signer.public())
}

/// Signs records.
#[derive(Debug)]
pub(super) struct Signer(Ed25519KeyPair);

impl Signer {
    fn parse(private: &str) -> Result<Self, RemoteError> {
        let seed = private.trim().strip_prefix(PRIVATE).and_then(unhex::<32>);
        let pair = seed.and_then(|seed| Ed25519KeyPair::from_seed_unchecked(&seed).ok());
        pair.map(Self).ok_or_else(|| {
            RemoteError::config("that is no private key", "`pipe keys new FILE` makes one")
        })
    }

    /// The key of the environment, else the file that `sign` names; none where neither is given.
    pub(super) fn of(settings: &Settings) -> Result<Option<Self>, RemoteError> {
        if let Ok(text) = std::env::var(VARIABLE)
            && !text.is_empty()
        {
            return Self::parse(&text).map(Some);
        }
        let Some(path) = &settings.sign else { return Ok(None) };
        let text = std::fs::read_to_string(path).map_err(|e| {
            RemoteError::config(
                format!("could not read the signing key {}: {e}", path.display()),
                format!("`pipe keys new FILE` makes one; in CI, {VARIABLE} may hold its text"),
            )
        })?;
        Self::parse(&text).map(Some)
    }

    pub(super) fn public(&self) -> PublicKey {
        let mut key = [0; 32];
        // The length of a public key is fixed by the algorithm.
        key.copy_from_slice(self.0.public_key().as_ref());
        PublicKey(key)
    }

    /// Adds the signature to the JSON of a record.
    pub(super) fn sign(&self, record: &mut Value) {
        let signature = self.0.sign(message(record).as_bytes());
        record["signature"] =
            json!({"key": self.public().to_string(), "value": hex(signature.as_ref())});
    }
}

/// Whether somebody trusted signed the record; without trusted keys anything goes.
///
/// # Errors
/// Why it is not to be used, for people.
pub(super) fn check(record: &Value, trusted: &[PublicKey]) -> Result<(), String> {
    if trusted.is_empty() {
        return Ok(());
    }
    let Some(signature) = record.get("signature") else {
        return Err("it is not signed, and `trusted_keys` asks for it".to_owned());
    };
    let text = |name| signature.get(name).and_then(Value::as_str).unwrap_or_default();
    let key: Option<PublicKey> = text("key").parse().ok();
    let Some(key) = key.filter(|key| trusted.contains(key)) else {
        return Err("it is signed by a key that is not among `trusted_keys`".to_owned());
    };
    let value: Option<[u8; 64]> = unhex(text("value"));
    let sound = value.is_some_and(|value| {
        UnparsedPublicKey::new(&ED25519, key.0).verify(message(record).as_bytes(), &value).is_ok()
    });
    if sound { Ok(()) } else { Err(format!("its signature by {key} is wrong")) }
}

fn message(record: &Value) -> String {
    let mut unsigned = record.clone();
    if let Some(members) = unsigned.as_object_mut() {
        members.remove("signature");
    }
    format!("{CONTEXT}{}", canonical(&unsigned))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn signature_holds_for_the_record_alone() {
        let (key, other) = (new_key().unwrap(), new_key().unwrap());
        let mut record = json!({"seconds": 1.25, "outputs": {"out": "x"}, "later": null});
        assert!(check(&record, &[key.public]).unwrap_err().contains("not signed"));
        Signer::parse(&key.private).unwrap().sign(&mut record);
        assert_eq!(check(&record, &[other.public, key.public]), Ok(()));
        assert_eq!(check(&record, &[]), Ok(()));
        assert!(check(&record, &[other.public]).unwrap_err().contains("not among"));
        let text = serde_json::to_string_pretty(&record).unwrap();
        assert_eq!(check(&serde_json::from_str(&text).unwrap(), &[key.public]), Ok(()));
        for (path, value) in [("/seconds", json!(1.5)), ("/outputs/out", json!("y"))] {
            let mut forged = record.clone();
            *forged.pointer_mut(path).unwrap() = value;
            assert!(check(&forged, &[key.public]).unwrap_err().contains("wrong"), "{path}");
        }
        record["more"] = json!(1);
        assert!(check(&record, &[key.public]).unwrap_err().contains("wrong"));
    }

    /// RFC 8032, section 7.1, test 1.
    #[test]
    fn key_is_derived_as_the_standard_says() {
        let private = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
        let public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
        let key = public_key(&format!("{PRIVATE}{private}")).unwrap();
        assert_eq!(key.to_string(), format!("ed25519:{public}"));
    }
}
