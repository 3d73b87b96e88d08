//! `remote:` at the top of a pipeline file.

use super::{Reader, Variables};
use crate::pipeline::problem::{Problem, suggest};
use crate::remote::{Policy, PublicKey, RemoteConfig};
use crate::yaml::Node;

const KEYS: [&str; 5] = ["url", "read", "write", "sign", "trusted_keys"];

impl Reader<'_> {
    /// The remote of a pipeline, if it has one.
    pub(in crate::pipeline) fn remote(
        &mut self,
        root: &Node,
        variables: &Variables<'_>,
    ) -> Option<RemoteConfig> {
        let node = variables.expand(root.get("remote")?, &mut self.problems);
        let entries = self.map(&node, "`remote`")?;
        self.unknown_keys(entries, &KEYS, "`remote`");
        let mut config = RemoteConfig::default();
        match node.get("url") {
            Some(url) => config.url = self.string(url, "`url` of the remote").unwrap_or_default(),
            None => self.problems.push(
                Problem::at("`remote` needs a `url`", node.place, "missing here")
                    .help("s3://BUCKET/PREFIX, gs://…, az://…, http(s)://…, or a folder"),
            ),
        }
        if let Some(read) = node.get("read") {
            config.read = self.policy(read, config.read);
        }
        if let Some(write) = node.get("write") {
            config.write = self.policy(write, config.write);
        }
        config.sign = node.get("sign").and_then(|sign| self.string(sign, "`sign`"));
        let keys = node.get("trusted_keys").map(|keys| self.strings(keys, "`trusted_keys`"));
        for (text, place) in keys.unwrap_or_default() {
            match text.parse::<PublicKey>() {
                Ok(key) => config.trusted_keys.push(key),
                Err(()) => self.problems.push(
                    Problem::at(format!("`{text}` is no public key"), place, "here").help(
                        "`ed25519:` and 64 hex digits, as `pipe keys new` and `pipe keys show` \
                         print it",
                    ),
                ),
            }
        }
        Some(config)
    }

    fn policy(&mut self, node: &Node, default: Policy) -> Policy {
        let Some(text) = self.string(node, "a policy of the remote") else { return default };
        text.parse().unwrap_or_else(|()| {
            let help = suggest(&text, Policy::NAMES);
            let message = format!("`{text}` is no policy of a remote");
            self.problems.push(Problem::at(message, node.place, "here").maybe_help(help));
            default
        })
    }
}
