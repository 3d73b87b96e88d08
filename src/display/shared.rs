//! The lines of a run, a pull or a push that have to do with the remote.

use super::{duration, size};
use crate::event::Event;

/// The line that stays on the screen for an event.
pub(super) fn lasting(event: &Event) -> Option<String> {
    Some(match event {
        Event::StageFetched { stage, fingerprint, bytes, seconds } => {
            let (fingerprint, size) = (fingerprint.short(), size(*bytes));
            format!("{stage}: fetched {fingerprint}, {size} in {}", duration(*seconds))
        }
        Event::StageNotFound { stage, why } => format!("{stage}: not fetched: {why}"),
        Event::StagePushed { stage, fingerprint, stored: true, seconds } => {
            format!("{stage}: pushed {} in {}", fingerprint.short(), duration(*seconds))
        }
        Event::StagePushed { stage, fingerprint, .. } => {
            format!("{stage}: the remote has {} already", fingerprint.short())
        }
        Event::RemoteWarning { message } => format!("warning: {message}"),
        Event::PushFinished { stored, there, failed, not_cached, seconds } => {
            let mut parts = vec![format!("{stored} pushed"), format!("{there} there already")];
            parts.extend((*failed > 0).then(|| format!("{failed} failed")));
            parts.extend((*not_cached > 0).then(|| format!("{not_cached} not in the cache")));
            format!("{} in {}", parts.join(", "), duration(*seconds))
        }
        _ => return None,
    })
}
