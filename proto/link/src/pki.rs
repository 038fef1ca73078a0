//! The cell's certificate authority: `forebay ca init` and `forebay ca issue`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use forebay_proto::ids::{IdError, check_name};
use forebay_proto::{Identity, Role};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, string::Ia5String,
};
use time::{Duration, OffsetDateTime};

use crate::credentials::identity_of;

const CA_DAYS: i64 = 3_650;

/// Longest life of an issued certificate in days.
pub(crate) const MAX_LEAF_DAYS: u32 = 825;

/// Why the authority could not do it.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file of the authority exists already.
    #[error("{0} exists: this directory has a CA; issue from it, or choose another --dir")]
    Exists(PathBuf),
    /// A file cannot be read or written.
    #[error("{path}: {error}{hint}", hint = if error.kind() == io::ErrorKind::NotFound { ": make a CA first with `forebay ca init`, or name its --dir" } else { "" })]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A name that cannot be in an identity.
    #[error(transparent)]
    Name(#[from] IdError),
    /// A validity that makes no sense.
    #[error("--days {0} is not between 1 and {MAX_LEAF_DAYS}")]
    Days(u32),
    /// The CA's files are not what `ca init` wrote.
    #[error("{path} is not a CA of Forebay: {problem}")]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The library refused.
    #[error("making the certificate failed: {0}")]
    Make(#[from] rcgen::Error),
}

/// A certificate with its key, in PEM.
pub struct Issued {
    /// Whom it names.
    pub identity: Identity,
    /// The certificate.
    pub cert_pem: String,
    /// Its private key (PKCS #8): a secret.
    pub key_pem: String,
}

/// A CA that vouches for one cell.
pub struct Authority {
    trust_domain: String,
    cert_pem: String,
    issuer: Issuer<'static, KeyPair>,
    key_pem: String,
}

impl Authority {
    /// Makes a CA for a cell. Its trust domain is `<cell>.<8 hex>`, the digits from `salt`, so that
    /// two cells of one name never trust each other.
    ///
    /// # Errors
    ///
    /// Returns [`PkiError`] for a cell that is not a name.
    pub fn create(cell: &str, salt: u32) -> Result<Self, PkiError> {
        check_name("cell", cell)?;
        let trust_domain = format!("{cell}.{salt:08x}");
        check_name("trust domain", &trust_domain)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&trust_domain);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        validity(&mut params, CA_DAYS);
        let cert_pem = params.self_signed(&key)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self {
            trust_domain,
            cert_pem,
            issuer: Issuer::new(params, key),
            key_pem,
        })
    }

    /// Writes `ca.pem` (0644) and `ca-key.pem` (0600) into a directory, which is made if needed.
    ///
    /// # Errors
    ///
    /// Returns [`PkiError::Exists`] rather than overwrite a CA.
    pub fn save(&self, dir: &Path) -> Result<(), PkiError> {
        make_dir(dir)?;
        write_new(&dir.join("ca-key.pem"), &self.key_pem, 0o600)?;
        write_new(&dir.join("ca.pem"), &self.cert_pem, 0o644)
    }

    /// Reads what [`Authority::save`] wrote.
    ///
    /// # Errors
    ///
    /// Returns which file is missing or not a CA of ours.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca-key.pem"));
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(|error| PkiError::Io {
                path: path.into(),
                error,
            })
        };
        let (cert_pem, key_pem) = (read(&cert_path)?, read(&key_path)?);
        let not_ours = |path: &Path, problem: String| PkiError::NotOurs {
            path: path.into(),
            problem,
        };
        let key =
            KeyPair::from_pem(&key_pem).map_err(|error| not_ours(&key_path, error.to_string()))?;
        let trust_domain =
            trust_domain_of(&cert_pem).map_err(|problem| not_ours(&cert_path, problem))?;
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, key)
            .map_err(|error| not_ours(&cert_path, error.to_string()))?;
        Ok(Self {
            trust_domain,
            cert_pem,
            issuer,
            key_pem,
        })
    }

    /// The cell and its salt.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The CA's own certificate.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Issues a certificate for client and server use.
    ///
    /// # Errors
    ///
    /// Returns [`PkiError`] for a bad name or validity.
    pub fn issue(&self, role: Role, name: &str, days: u32) -> Result<Issued, PkiError> {
        check_name("name", name)?;
        if !(1..=MAX_LEAF_DAYS).contains(&days) {
            return Err(PkiError::Days(days));
        }
        let identity = Identity {
            trust_domain: self.trust_domain.clone(),
            role,
            name: name.into(),
        };
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        params.subject_alt_names = vec![uri(&identity.to_string())?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        validity(&mut params, i64::from(days));
        let cert_pem = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued {
            identity,
            cert_pem,
            key_pem: key.serialize_pem(),
        })
    }
}

impl Issued {
    /// Writes `NAME.pem` (0644) and `NAME-key.pem` (0600) into a directory, which is made if needed.
    ///
    /// # Errors
    ///
    /// Returns [`PkiError::Exists`] rather than overwrite a key.
    pub fn save(&self, dir: &Path) -> Result<(PathBuf, PathBuf), PkiError> {
        make_dir(dir)?;
        let name = &self.identity.name;
        let (cert, key) = (
            dir.join(format!("{name}.pem")),
            dir.join(format!("{name}-key.pem")),
        );
        write_new(&key, &self.key_pem, 0o600)?;
        write_new(&cert, &self.cert_pem, 0o644)?;
        Ok((cert, key))
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn uri(text: &str) -> Result<SanType, PkiError> {
    Ok(SanType::URI(Ia5String::try_from(text)?))
}

/// From five minutes ago, for clocks that are a little apart.
fn validity(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::minutes(5);
    params.not_after = now + Duration::days(days);
}

fn trust_domain_of(ca_pem: &str) -> Result<String, String> {
    use rustls_pki_types::pem::PemObject;
    let der = rustls_pki_types::CertificateDer::from_pem_slice(ca_pem.as_bytes())
        .map_err(|error| error.to_string())?;
    identity_of(&der)
        .map_err(|error| error.to_string())?
        .strip_prefix("spiffe://")
        .filter(|domain| check_name("trust domain", domain).is_ok())
        .map(str::to_owned)
        .ok_or_else(|| "its name is not spiffe://<trust domain>".to_owned())
}

fn make_dir(dir: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|error| PkiError::Io {
            path: dir.into(),
            error,
        })
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => PkiError::Exists(path.into()),
            _ => PkiError::Io {
                path: path.into(),
                error,
            },
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_is_never_overwritten_and_loads_as_it_was_saved() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create("prod", 7).unwrap();
        assert_eq!(authority.trust_domain(), "prod.00000007");
        authority.save(dir.path()).unwrap();
        assert!(matches!(
            authority.save(dir.path()),
            Err(PkiError::Exists(_))
        ));
        assert_eq!(
            Authority::load(dir.path()).unwrap().trust_domain(),
            "prod.00000007"
        );
    }

    #[test]
    fn bad_names_and_validities_are_refused() {
        let authority = Authority::create("prod", 7).unwrap();
        assert!(matches!(
            authority.issue(Role::Agent, "a/b", 30),
            Err(PkiError::Name(_))
        ));
        assert!(matches!(
            authority.issue(Role::Agent, "w1", 0),
            Err(PkiError::Days(0))
        ));
        assert!(matches!(Authority::create("", 7), Err(PkiError::Name(_))));
    }

    #[test]
    fn a_missing_ca_says_how_to_make_one() {
        let dir = tempfile::tempdir().unwrap();
        let Err(error) = Authority::load(dir.path()) else {
            panic!("loaded nothing")
        };
        assert!(error.to_string().contains("forebay ca init"), "{error}");
    }
}
