//! `forebay keys`: API keys for balancers, which keep hashes only, and the key of fingerprints.

use std::io::Read as _;

use clap::{Args, Subcommand};
use forebay_proto::Revision;
use forebay_proto::ids::check_name;
use forebay_proto::wire::fleet::RotateKey;
use forebay_proto::wire::fleet::command::Action;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::ask::Asked;
use crate::context::ContextArgs;
use crate::exit::CliError;
use crate::output::OutputArgs;

/// Options of `forebay keys`.
#[derive(Debug, Args)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    verb: KeysVerb,
}

#[derive(Debug, Subcommand)]
enum KeysVerb {
    /// Read one key from stdin and print its entry for the balancers' keys file.
    #[command(after_help = "Example:\n  forebay keys hash --tenant team-a < key.txt >> keys.toml")]
    Hash(HashArgs),
    /// Replace the key with which balancers fingerprint prompts. The one before stays known.
    #[command(
        after_help = "Examples:\n  forebay keys rotate --reason 'every quarter'\n  forebay keys rotate --expected-epoch 3 --reason 'b2 was stolen'\n\nNeeds the role operator/admin. The new key is drawn here and never shown. What is cached under\nthe key before is still found for an hour, while requests move over; a second rotation forgets it\nat once, and every prompt is prefilled anew.\n\nUndo: none; a key that was replaced twice is gone."
    )]
    Rotate(RotateArgs),
}

#[derive(Debug, Args)]
struct RotateArgs {
    /// Refuse unless this is the epoch of the newest key; default: the one that it has when asked.
    #[arg(long, value_name = "N")]
    expected_epoch: Option<u32>,
    /// Why, for the audit.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    context: ContextArgs,
}

/// Which key is the newest; never the key.
#[derive(Serialize)]
struct Rotated {
    schema_version: u32,
    /// Of the newest key.
    epoch: u32,
    /// Of the one that balancers still look up; null: there was none.
    previous_epoch: Option<u32>,
    revision: Revision,
}

#[derive(Debug, Args)]
struct HashArgs {
    /// The tenant whose key it is.
    #[arg(long, value_name = "NAME")]
    tenant: String,
    /// A model that it may ask, repeatable. Default: all.
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// The zone that its requests must stay in. Default: any.
    #[arg(long, value_name = "ZONE")]
    zone: Option<String>,
    /// Requests that it may ask in a minute, of each balancer. Default: any number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    requests_per_minute: Option<u32>,
    /// Requests that it may have under way, on each balancer. Default: any number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_parallel: Option<u32>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Hashed {
    schema_version: u32,
    sha256: String,
    tenant: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    models: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_per_minute: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_parallel: Option<u32>,
}

impl Hashed {
    /// Its entry of the keys file.
    fn entry(&self) -> String {
        let Self { sha256, tenant, .. } = self;
        let mut entry = format!("[[keys]]\nsha256 = \"{sha256}\"\ntenant = \"{tenant}\"");
        if !self.models.is_empty() {
            // JSON's strings without control characters are TOML's.
            let models = serde_json::Value::from(self.models.as_slice());
            entry += &format!("\nmodels = {models}");
        }
        if let Some(zone) = &self.zone {
            entry += &format!("\nzone = {}", serde_json::Value::from(zone.as_str()));
        }
        let limits = [
            ("requests_per_minute", self.requests_per_minute),
            ("max_parallel", self.max_parallel),
        ];
        for (name, limit) in limits {
            if let Some(limit) = limit {
                entry += &format!("\n{name} = {limit}");
            }
        }
        entry
    }
}

/// Runs `forebay keys`.
pub(crate) fn run(args: KeysArgs) -> Result<(), CliError> {
    match args.verb {
        KeysVerb::Hash(args) => hash_one(args),
        KeysVerb::Rotate(args) => rotate(&args),
    }
}

fn rotate(args: &RotateArgs) -> Result<(), CliError> {
    let context = args.context.resolve()?;
    crate::roles::thread()?.block_on(async {
        let asked = Asked::new(context)?;
        let previous = match args.expected_epoch {
            Some(epoch) => epoch,
            None => asked.read().await?.key_epoch,
        };
        let action = Action::RotateKey(RotateKey {
            expected_epoch: previous,
            key: drawn().to_vec().into(),
        });
        let done = asked
            .client
            .propose(action, &args.reason, asked.timeout)
            .await?;
        let rotated = Rotated {
            schema_version: 1,
            epoch: previous.saturating_add(1),
            previous_epoch: (previous > 0).then_some(previous),
            revision: done.revision,
        };
        args.output.print(&rotated, || page(&rotated));
        Ok(())
    })
}

/// A new key, by a generator that the system seeds.
fn drawn() -> [u8; 16] {
    rand::random()
}

fn page(rotated: &Rotated) -> String {
    let before = rotated.previous_epoch.map_or_else(String::new, |epoch| {
        format!("; what is cached under epoch {epoch} is found for an hour")
    });
    format!(
        "the newest key has epoch {} as of {}{before}",
        rotated.epoch, rotated.revision
    )
}

fn hash_one(args: HashArgs) -> Result<(), CliError> {
    check_name("tenant", &args.tenant).map_err(|error| CliError::usage(error.to_string()))?;
    if args
        .models
        .iter()
        .any(|model| model.contains(char::is_control))
    {
        return Err(CliError::usage(
            "--model: a model's name has no control characters",
        ));
    }
    let mut text = String::new();
    std::io::stdin()
        .take(MAX_KEY_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|error| CliError::usage(format!("stdin: {error}: give one key as text")))?;
    let hashed = Hashed {
        schema_version: 1,
        sha256: hash(&text).map_err(CliError::usage)?,
        tenant: args.tenant,
        models: args.models,
        zone: args.zone,
        requests_per_minute: args.requests_per_minute,
        max_parallel: args.max_parallel,
    };
    args.output.print(&hashed, || hashed.entry());
    Ok(())
}

fn hash(text: &str) -> Result<String, String> {
    let key = text.trim_end_matches(['\r', '\n']);
    if key.is_empty() {
        return Err("stdin holds no key: pipe one in".into());
    }
    if key.len() as u64 > MAX_KEY_BYTES {
        return Err(format!("the key is longer than {MAX_KEY_BYTES} bytes"));
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the key has characters that no Authorization header carries: use visible ASCII on one line".into());
    }
    let digest = Sha256::digest(key.as_bytes());
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

const MAX_KEY_BYTES: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_toml_with_the_limits_that_were_asked_for() {
        let mut hashed = Hashed {
            schema_version: 1,
            sha256: "00".into(),
            tenant: "a".into(),
            models: Vec::new(),
            zone: None,
            requests_per_minute: None,
            max_parallel: None,
        };
        assert_eq!(hashed.entry().lines().count(), 3);
        hashed.models = vec!["a/\"b\\".into(), "c".into()];
        hashed.zone = Some("eu-1".into());
        hashed.requests_per_minute = Some(60);
        hashed.max_parallel = Some(5);
        let entry: toml::Table = toml::from_str(&hashed.entry()).unwrap();
        let key = entry["keys"][0].as_table().unwrap();
        assert_eq!(key["models"][0].as_str(), Some("a/\"b\\"));
        assert_eq!(key["zone"].as_str(), Some("eu-1"));
        assert_eq!(key["requests_per_minute"].as_integer(), Some(60));
        assert_eq!(key["max_parallel"].as_integer(), Some(5));
    }

    #[test]
    fn a_key_is_hashed_without_its_line_end() {
        assert_eq!(hash("abc\n"), hash("abc"));
        assert!(hash("abc").unwrap().starts_with("ba7816bf"));
        for bad in ["", "\n", "a b", "a\nb", &"x".repeat(513)] {
            assert!(hash(bad).is_err(), "{bad:?}");
        }
    }
}
