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
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Hashed {
    schema_version: u32,
    sha256: String,
    tenant: String,
}

/// Runs `forebay keys`.
pub(crate) fn run(args: KeysArgs) -> Result<(), CliError> {
    let KeysVerb::Hash(args) = args.verb;
    check_name("tenant", &args.tenant).map_err(|error| CliError::usage(error.to_string()))?;
    let mut text = String::new();
    std::io::stdin()
        .take(MAX_KEY_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|error| CliError::usage(format!("stdin: {error}: give one key as text")))?;
    let hashed = Hashed {
        schema_version: 1,
        sha256: hash(&text).map_err(CliError::usage)?,
        tenant: args.tenant,
    };
    args.output.print(&hashed, || {
        let Hashed { sha256, tenant, .. } = &hashed;
        format!("[[keys]]\nsha256 = \"{sha256}\"\ntenant = \"{tenant}\"")
    });
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
    fn a_key_is_hashed_without_its_line_end() {
        assert_eq!(hash("abc\n"), hash("abc"));
        assert!(hash("abc").unwrap().starts_with("ba7816bf"));
        for bad in ["", "\n", "a b", "a\nb", &"x".repeat(513)] {
            assert!(hash(bad).is_err(), "{bad:?}");
        }
    }
}
