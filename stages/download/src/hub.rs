//! What a hub holds: the commit behind a revision and the files of that commit.
//!
//! This is the part of the job that crate hf-hub does. It does not do the rest: its download
//! starts from zero after a cut, it ignores `Retry-After` and `HF_HUB_OFFLINE`, and its listing
//! drops the sha256 of large files (the hub names it `oid`). So its own retries are off here,
//! bytes move through [`crate::transfer`], and the sha256 comes from the header `X-Linked-Etag`.

use std::time::Duration;

use hf_hub::repository::{RepoTreeEntry, RepoType as HubRepoType};
use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync, HFResult, split_id};
use reqwest::Url;

use crate::error::{DownloadError, shown, transport};
use crate::name::{hint, is_tree_name};
use crate::params::{HfSource, RepoType};
use crate::settings::Settings;
use crate::transfer::{Trouble, repeat};

/// The files of one commit.
#[derive(Clone, Debug)]
pub(crate) struct Listing {
    /// Commit of 40 hexadecimal digits.
    pub(crate) commit: String,
    /// In the order of their paths.
    pub(crate) files: Vec<Listed>,
}

/// One file of a [`Listing`].
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) path: String,
    pub(crate) size: u64,
    /// Object id in git: name of the blob in the Hugging Face cache unless the file is large.
    pub(crate) oid: String,
    /// Kept outside git, addressed by sha256.
    pub(crate) is_large: bool,
}

/// The hub's programming interface.
pub(crate) struct Hub<'a> {
    client: HFClientSync,
    settings: &'a Settings,
    source: &'a HfSource,
}

impl<'a> Hub<'a> {
    pub(crate) fn new(settings: &'a Settings, source: &'a HfSource) -> Result<Self, DownloadError> {
        let builder = HFClient::builder()
            .endpoint(settings.endpoint.clone())
            .user_agent(concat!("pipe/", env!("CARGO_PKG_VERSION")))
            .cache_enabled(false)
            .retry_max_attempts(0);
        let builder = match &settings.token {
            Some(token) => builder.token(token.expose()),
            None => builder,
        };
        let client = builder.build_sync().map_err(|error| DownloadError::Answer {
            what: "the hub's address in HF_ENDPOINT".to_owned(),
            why: plain(error),
        })?;
        Ok(Self { client, settings, source })
    }

    /// Resolves the source's revision and lists that commit.
    pub(crate) fn listing(&self) -> Result<Listing, DownloadError> {
        let (owner, name) = split_id(&self.source.repo);
        match self.source.repo_type {
            RepoType::Model => {
                let repo = self.client.model(owner, name);
                let commit = self.commit(&repo, || {
                    let asked = repo.info().revision(self.source.revision.as_str());
                    Ok(asked.expand(vec!["sha".to_owned()]).send()?.sha)
                })?;
                self.files(&repo, commit)
            }
            RepoType::Dataset => {
                let repo = self.client.dataset(owner, name);
                let commit = self.commit(&repo, || {
                    let asked = repo.info().revision(self.source.revision.as_str());
                    Ok(asked.expand(vec!["sha".to_owned()]).send()?.sha)
                })?;
                self.files(&repo, commit)
            }
        }
    }

    fn commit<T: HubRepoType>(
        &self,
        repo: &HFRepositorySync<T>,
        mut ask: impl FnMut() -> HFResult<Option<String>>,
    ) -> Result<String, DownloadError> {
        let what = describe(self.source);
        let answered = self.call(&what, &mut ask).map_err(|error| match error {
            DownloadError::Missing { what, said, .. } => self.name_refs(repo, what, said),
            other => other,
        })?;
        answered.ok_or_else(|| DownloadError::Answer {
            what,
            why: "the hub's answer names no commit".to_owned(),
        })
    }

    /// A missing repository or revision, with the branches and tags there are.
    fn name_refs<T: HubRepoType>(
        &self,
        repo: &HFRepositorySync<T>,
        what: String,
        said: String,
    ) -> DownloadError {
        let Ok(refs) = repo.list_refs().send() else {
            let kind = self.source.repo_type.name();
            let help = format!(
                "check the name; `repo_type` is `{kind}`, and a private repository needs HF_TOKEN"
            );
            return DownloadError::Missing { what, said, help };
        };
        let names: Vec<String> =
            refs.branches.into_iter().chain(refs.tags).map(|one| one.name).collect();
        let help = hint(&self.source.revision, &names);
        DownloadError::Missing { what, said, help }
    }

    fn files<T: HubRepoType>(
        &self,
        repo: &HFRepositorySync<T>,
        commit: String,
    ) -> Result<Listing, DownloadError> {
        let what = format!("the listing of {}", describe(self.source));
        let entries = self.call(&what, &mut || {
            repo.list_tree().revision(commit.as_str()).recursive(true).send()
        })?;
        let mut files: Vec<Listed> = entries
            .into_iter()
            .filter_map(|entry| match entry {
                RepoTreeEntry::File { oid, size, path, lfs, .. } => {
                    Some(Listed { path, size, oid, is_large: lfs.is_some() })
                }
                RepoTreeEntry::Directory { .. } => None,
            })
            .collect();
        if let Some(bad) = files.iter().find(|file| !is_tree_name(&file.path)) {
            return Err(DownloadError::UnsafeName { name: bad.path.clone() });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Listing { commit, files })
    }

    fn call<T>(
        &self,
        what: &str,
        ask: &mut dyn FnMut() -> HFResult<T>,
    ) -> Result<T, DownloadError> {
        repeat(self.settings.retries, what, || {
            (ask().map_err(|error| self.sort(what, error)), false)
        })
    }

    /// Sorts hf-hub's errors into passing and final ones.
    fn sort(&self, what: &str, error: HFError) -> Trouble {
        let what = what.to_owned();
        match error {
            HFError::RateLimited { retry_after, .. } => Trouble::Again {
                why: "the hub answers 429 Too Many Requests".to_owned(),
                wait: retry_after,
                rate_limited: true,
            },
            HFError::AuthRequired { context } | HFError::Forbidden { context } => {
                self.refused(what, context.status.as_u16(), context.server_message)
            }
            HFError::RepoNotFound { context, .. }
            | HFError::RevisionNotFound { context, .. }
            | HFError::EntryNotFound { context, .. } => {
                let said = context.and_then(|context| context.server_message);
                let said = self.tail(said);
                Trouble::Fatal(DownloadError::Missing { what, said, help: String::new() })
            }
            HFError::Http { context } => match context.status.as_u16() {
                401 | 403 => self.refused(what, context.status.as_u16(), context.server_message),
                404 => {
                    let said = self.tail(context.server_message);
                    Trouble::Fatal(DownloadError::Missing { what, said, help: String::new() })
                }
                408 | 429 | 500 | 502 | 503 | 504 => {
                    let wait: Option<Duration> = None;
                    let why = format!("the hub answers {}", context.status);
                    Trouble::Again { why, wait, rate_limited: context.status.as_u16() == 429 }
                }
                _ => {
                    let said = self.tail(context.server_message);
                    let why = format!("the hub answers {}{said}", context.status);
                    Trouble::Fatal(DownloadError::Answer { what, why })
                }
            },
            HFError::Request { source, .. } if !source.is_decode() && !source.is_builder() => {
                let host = Url::parse(&self.settings.endpoint);
                let host = host.map_or_else(|_| "the hub".to_owned(), |url| shown(&url));
                Trouble::again(&format!("no answer from {host}: {}", transport(source)))
            }
            other => Trouble::Fatal(DownloadError::Answer { what, why: plain(other) }),
        }
    }

    fn refused(&self, what: String, status: u16, said: Option<String>) -> Trouble {
        Trouble::Fatal(DownloadError::Refused {
            what,
            status,
            said: self.tail(said),
            has_token: self.settings.token.is_some(),
            page: Some(page(self.settings, self.source)),
        })
    }

    /// The hub's own words as a tail for a message; never with the token.
    fn tail(&self, said: Option<String>) -> String {
        let Some(said) = said.filter(|said| !said.is_empty()) else { return String::new() };
        let said = match &self.settings.token {
            Some(token) => said.replace(token.expose(), "…"),
            None => said,
        };
        let short: String = said.chars().take(200).collect();
        format!(": {}", short.trim_end_matches('.'))
    }
}

/// An hf-hub error without an address.
fn plain(error: HFError) -> String {
    match error {
        HFError::Request { source, .. } => transport(source),
        HFError::MalformedResponse { what, .. } => what,
        HFError::Http { context } => format!("the hub answers {}", context.status),
        other => other.to_string(),
    }
}

/// The repository and revision in words.
pub(crate) fn describe(source: &HfSource) -> String {
    format!("{} `{}` at `{}`", source.repo_type.name(), source.repo, source.revision)
}

/// The repository's page, where terms are accepted.
pub(crate) fn page(settings: &Settings, source: &HfSource) -> String {
    let prefix = url_prefix(source.repo_type);
    let endpoint = Url::parse(&settings.endpoint).map(|url| shown(&url)).unwrap_or_default();
    format!("{}/{prefix}{}", endpoint.trim_end_matches('/'), source.repo)
}

/// Address of a file's bytes at a revision.
pub(crate) fn resolve_url(
    settings: &Settings,
    source: &HfSource,
    revision: &str,
    path: &str,
) -> Result<Url, DownloadError> {
    let bad = |why: String| DownloadError::Answer {
        what: "the hub's address in HF_ENDPOINT".to_owned(),
        why,
    };
    let mut url = Url::parse(&settings.endpoint).map_err(|error| bad(error.to_string()))?;
    let prefix = url_prefix(source.repo_type).trim_end_matches('/');
    {
        let mut segments =
            url.path_segments_mut().map_err(|()| bad("it is not a web address".to_owned()))?;
        segments.pop_if_empty();
        if !prefix.is_empty() {
            segments.push(prefix);
        }
        segments.extend(source.repo.split('/')).push("resolve").push(revision);
        segments.extend(path.split('/'));
    }
    Ok(url)
}

fn url_prefix(repo_type: RepoType) -> &'static str {
    match repo_type {
        RepoType::Model => "",
        RepoType::Dataset => "datasets/",
    }
}
