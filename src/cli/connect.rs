//! Which sidecar, and the secret for it: what all of the client's subcommands share.

use super::exit::Trouble;
use crate::client::Client;
use secrecy::SecretString;
use std::path::{Path, PathBuf};

/// The variable with the secret.
const SECRET: &str = "OPENCODE_SHARED_SECRET";

/// The variables, as each help lists them.
pub(super) const VARIABLES: &str = "\
Variables:
  OPENCODE_SIDECAR_URL    where the sidecar listens, instead of --url
  OPENCODE_SHARED_SECRET  the secret that lets callers in, instead of --token-file
  NO_COLOR                any value: no colours";

/// Which sidecar to talk to.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Which sidecar")]
pub(super) struct Connect {
    /// Where it listens
    #[arg(
        long,
        value_name = "URL",
        env = "OPENCODE_SIDECAR_URL",
        default_value = "http://127.0.0.1:3003",
        hide_env_values = true
    )]
    url: String,
    /// File with its secret; without it the variable OPENCODE_SHARED_SECRET has it
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Connect {
    /// A client of it.
    pub(super) fn client(&self) -> Result<Client, Trouble> {
        let secret = match &self.token_file {
            Some(file) => Some(secret_file(file)?),
            None => secret_variable(SECRET)?,
        };
        Ok(Client::new(&self.url, secret)?)
    }
}

/// The secret that is in a file; white space at its ends is not part of it.
pub(super) fn secret_file(file: &Path) -> Result<SecretString, Trouble> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| Trouble::Usage(format!("the file {} cannot be read: {error}", file.display())))?;
    if text.trim().is_empty() {
        return Err(Trouble::Usage(format!("the file {} is empty", file.display())));
    }
    Ok(text.trim().into())
}

/// The secret that is in a variable; an empty one is none.
pub(super) fn secret_variable(name: &str) -> Result<Option<SecretString>, Trouble> {
    match std::env::var(name) {
        Ok(text) => Ok(Some(text).filter(|text| !text.is_empty()).map(SecretString::from)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(Trouble::Usage(format!("{name} is not text"))),
    }
}
