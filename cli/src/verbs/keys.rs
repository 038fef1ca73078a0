//! `forebay keys`: API keys for balancers, which keep hashes only.

use std::io::Read as _;

use clap::{Args, Subcommand};
use forebay_proto::ids::check_name;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

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
}

#[derive(Debug, Args)]
struct HashArgs {
    /// The tenant whose key it is.
    #[arg(long, value_name = "NAME")]
    tenant: String,
    /// A model that it may ask, repeatable. Default: all.
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
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
    let KeysVerb::Hash(args) = args.verb;
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
            requests_per_minute: None,
            max_parallel: None,
        };
        assert_eq!(hashed.entry().lines().count(), 3);
        hashed.models = vec!["a/\"b\\".into(), "c".into()];
        hashed.requests_per_minute = Some(60);
        hashed.max_parallel = Some(5);
        let entry: toml::Table = toml::from_str(&hashed.entry()).unwrap();
        let key = entry["keys"][0].as_table().unwrap();
        assert_eq!(key["models"][0].as_str(), Some("a/\"b\\"));
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
