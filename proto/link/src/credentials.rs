//! A process's own certificate, key and the CA it trusts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use forebay_proto::Identity;
use forebay_proto::identity::IdentityError;
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::server::ParsedCertificate;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Where the three files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialPaths {
    /// The CA's certificate (PEM).
    pub ca: PathBuf,
    /// Our certificate (PEM).
    pub cert: PathBuf,
    /// Our private key (PEM).
    pub key: PathBuf,
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system or the PEM reader says.
        error: String,
    },
    /// A certificate that is not X.509, or names nobody.
    #[error("{path}: {error}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: CertificateError,
    },
    /// Our certificate was not issued by this CA.
    #[error("{cert} names {found}, but {ca} vouches for {expected}: use the CA that issued it")]
    OtherCa {
        /// Our certificate.
        cert: PathBuf,
        /// The CA's.
        ca: PathBuf,
        /// Trust domain of our certificate.
        found: String,
        /// Trust domain of the CA.
        expected: String,
    },
    /// TLS refuses the pair.
    #[error("{cert} and {key} do not work together: {error}")]
    Pair {
        /// Our certificate.
        cert: PathBuf,
        /// Our key.
        key: PathBuf,
        /// What TLS says.
        error: String,
    },
}

/// What is wrong with one certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not X.509.
    #[error("not an X.509 certificate")]
    NotX509,
    /// It must have exactly one URI name.
    #[error("has {0} URI names instead of one: issue it with `forebay ca issue`")]
    UriNames(usize),
    /// Its URI name is not an identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// From when until when a certificate holds, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Not before.
    pub from: i64,
    /// Not after.
    pub until: i64,
}

/// Certificate, key and CA, read and matched.
#[derive(Debug)]
pub struct Credentials {
    identity: Identity,
    validity: Validity,
    authority_validity: Validity,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) roots: RootCertStore,
    pub(crate) paths: CredentialPaths,
}

impl Credentials {
    /// Reads the three files and checks that they belong together.
    ///
    /// # Errors
    ///
    /// Returns which file is wrong and why.
    pub fn load(paths: &CredentialPaths) -> Result<Self, CredentialsError> {
        let read = |path: &Path, error: rustls_pki_types::pem::Error| CredentialsError::Read {
            path: path.into(),
            error: match error {
                rustls_pki_types::pem::Error::NoItemsFound => {
                    "there is no such PEM section in it; `forebay ca issue` writes what is needed"
                        .into()
                }
                other => other.to_string(),
            },
        };
        let certificates = |path: &Path| {
            let found = CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(|error| read(path, error))?;
            if found.is_empty() {
                return Err(read(path, rustls_pki_types::pem::Error::NoItemsFound));
            }
            Ok(found)
        };
        let broken = |path: &Path, error| CredentialsError::Certificate {
            path: path.into(),
            error,
        };
        let (chain, authorities) = (certificates(&paths.cert)?, certificates(&paths.ca)?);
        let key =
            PrivateKeyDer::from_pem_file(&paths.key).map_err(|error| read(&paths.key, error))?;
        let leaf = chain
            .first()
            .ok_or(broken(&paths.cert, CertificateError::NotX509))?;
        let identity = peer_identity(leaf).map_err(|error| broken(&paths.cert, error))?;
        let mut roots = RootCertStore::empty();
        let mut expected = String::new();
        let mut authority_validity = Validity {
            from: i64::MIN,
            until: i64::MAX,
        };
        for authority in &authorities {
            let uri = identity_of(authority).map_err(|error| broken(&paths.ca, error))?;
            let held = validity_of(authority).map_err(|error| broken(&paths.ca, error))?;
            authority_validity.from = authority_validity.from.max(held.from);
            authority_validity.until = authority_validity.until.min(held.until);
            expected = uri.trim_start_matches("spiffe://").to_owned();
            roots
                .add(authority.clone())
                .map_err(|_| broken(&paths.ca, CertificateError::NotX509))?;
        }
        if expected != identity.trust_domain {
            return Err(CredentialsError::OtherCa {
                cert: paths.cert.clone(),
                ca: paths.ca.clone(),
                found: identity.trust_domain,
                expected,
            });
        }
        Ok(Self {
            validity: validity_of(leaf).map_err(|error| broken(&paths.cert, error))?,
            authority_validity,
            identity,
            chain,
            key,
            roots,
            paths: paths.clone(),
        })
    }

    /// Whom our certificate names.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// From when until when our certificate holds.
    #[must_use]
    pub const fn validity(&self) -> Validity {
        self.validity
    }

    /// From when until when all CA certificates do.
    #[must_use]
    pub const fn authority_validity(&self) -> Validity {
        self.authority_validity
    }

    /// Checks that the CA signed our certificate, and that it is for what we need, as of `now` (since 1970).
    ///
    /// # Errors
    ///
    /// Returns what TLS says, as peers will.
    pub fn check_chain(&self, now: Duration) -> Result<(), String> {
        let [leaf, intermediates @ ..] = &self.chain[..] else {
            return Err("there is no certificate".into());
        };
        let provider = rustls::crypto::ring::default_provider();
        let verified = ParsedCertificate::try_from(leaf).and_then(|leaf| {
            verify_server_cert_signed_by_trust_anchor(
                &leaf,
                &self.roots,
                intermediates,
                UnixTime::since_unix_epoch(now),
                provider.signature_verification_algorithms.all,
            )
        });
        verified.map_err(|error| error.to_string())
    }
}

/// The identity in a peer's certificate.
pub(crate) fn peer_identity(leaf: &CertificateDer<'_>) -> Result<Identity, CertificateError> {
    Ok(identity_of(leaf)?.parse()?)
}

fn validity_of(der: &CertificateDer<'_>) -> Result<Validity, CertificateError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| CertificateError::NotX509)?;
    let validity = certificate.validity();
    Ok(Validity {
        from: validity.not_before.timestamp(),
        until: validity.not_after.timestamp(),
    })
}

/// The one URI name of a certificate.
pub(crate) fn identity_of(der: &CertificateDer<'_>) -> Result<String, CertificateError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| CertificateError::NotX509)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| CertificateError::NotX509)?
        .map_or(&[][..], |extension| &extension.value.general_names);
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => Ok(uri.to_owned()),
        _ => Err(CertificateError::UriNames(uris.len())),
    }
}
