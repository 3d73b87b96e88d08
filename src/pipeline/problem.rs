//! What is wrong with a pipeline, with file, line, column and a label under the source.

use std::fmt;
use std::sync::Arc;

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode, SourceSpan};

use crate::yaml::Place;

/// The texts that a pipeline came from: its file, then each `--set` argument.
#[derive(Clone, Debug)]
pub struct Sources(Vec<NamedSource<Arc<str>>>);

impl Sources {
    /// The pipeline file alone.
    pub fn new(name: &str, text: &str) -> Self {
        Self(vec![NamedSource::new(name, Arc::from(text))])
    }

    /// Adds a source; its index goes into [`Place::source`].
    pub fn add(&mut self, name: &str, text: &str) -> usize {
        self.0.push(NamedSource::new(name, Arc::from(text)));
        self.0.len() - 1
    }

    /// Text of a source.
    pub fn text(&self, source: usize) -> &str {
        self.0.get(source).map_or("", |s| s.inner())
    }

    /// `file:line:column` of a place, both from 1.
    pub fn locate(&self, place: Place) -> String {
        let text = self.text(place.source);
        let before = text.get(..place.start.min(text.len())).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        let name = self.0.get(place.source).map_or("", NamedSource::name);
        format!("{name}:{line}:{column}")
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Problem {
    message: String,
    help: Option<String>,
    labels: Vec<(Place, String)>,
    source: Option<NamedSource<Arc<str>>>,
}

impl Problem {
    /// A problem with the label that points at it.
    pub fn at(message: impl Into<String>, place: Place, label: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            help: None,
            labels: vec![(place, label.into())],
            source: None,
        }
    }

    /// The same problem with a hint.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The same problem with a hint where there is one.
    #[must_use]
    pub fn maybe_help(mut self, help: Option<String>) -> Self {
        self.help = help.or(self.help);
        self
    }

    /// The same problem with one more place.
    #[must_use]
    pub fn also(mut self, place: Place, label: impl Into<String>) -> Self {
        self.labels.push((place, label.into()));
        self
    }

    /// Takes the text of the first label's source along; labels in other sources become words.
    fn located(mut self, sources: &Sources) -> Self {
        let Some(source) = self.labels.first().map(|(place, _)| place.source) else { return self };
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            self.labels.drain(..).partition(|(place, _)| place.source == source);
        for (place, label) in elsewhere {
            self.message.push_str(&format!(" ({label}: {})", sources.locate(place)));
        }
        self.labels = here;
        self.source = sources.0.get(source).cloned();
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

impl Diagnostic for Problem {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|h| Box::new(h) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.as_ref().map(|s| s as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(self.labels.iter().map(|(place, label)| {
            let length = place.end.saturating_sub(place.start);
            let span = SourceSpan::new(place.start.into(), length);
            LabeledSpan::new_with_span(Some(label.clone()), span)
        })))
    }
}

/// Everything that is wrong with a pipeline, in source order; never empty.
#[derive(Debug)]
pub struct PipelineError(Vec<Problem>);

impl PipelineError {
    /// An error without a place: the file cannot be read, say.
    pub fn plain(message: impl Into<String>, help: Option<String>) -> Self {
        let problem = Problem { message: message.into(), help, labels: Vec::new(), source: None };
        Self(vec![problem])
    }

    /// The problems, each with its source.
    pub fn of(mut problems: Vec<Problem>, sources: &Sources) -> Self {
        problems.sort_by_key(|p| p.labels.first().map(|(place, _)| *place));
        // Points of a sweep share what is wrong with them.
        problems.dedup_by(|a, b| a.message == b.message && a.labels == b.labels);
        Self(problems.into_iter().map(|p| p.located(sources)).collect())
    }

    /// Each problem by itself, to be shown one after the other.
    pub fn problems(&self) -> &[Problem] {
        &self.0
    }
}

impl fmt::Display for PipelineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if i > 0 { "; " } else { "" })?;
        }
        Ok(())
    }
}

impl std::error::Error for PipelineError {}

/// `did you mean …` or the list of what there is.
pub fn suggest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let known: Vec<&str> = known.into_iter().collect();
    let close = known
        .iter()
        .map(|k| (strsim::damerau_levenshtein(&wrong.to_lowercase(), &k.to_lowercase()), *k))
        .filter(|(distance, k)| *distance <= 1 + k.chars().count().max(wrong.len()) / 4)
        .min();
    if let Some((_, name)) = close {
        return Some(format!("did you mean `{name}`?"));
    }
    let starts = known.iter().find(|k| k.starts_with(wrong) || wrong.starts_with(**k));
    match (starts, known.as_slice()) {
        (Some(name), _) => Some(format!("did you mean `{name}`?")),
        (None, []) => None,
        (None, names) if names.len() <= 20 => Some(format!("known: {}", names.join(", "))),
        (None, names) => {
            Some(format!("known: {}, … ({} in all)", names[..20].join(", "), names.len()))
        }
    }
}
