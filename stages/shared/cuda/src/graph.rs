//! Recorded sequences of launches: a CUDA graph costs the host one call where its launches cost
//! thousands.

use std::cell::RefCell;
use std::collections::HashMap;

use cudarc::driver::{
    result::{graph, stream},
    sys,
};

use crate::CudaError;
use crate::device::Device;

/// Launches recorded by [`Device::record`], ready to run again and again on the same addresses.
pub(crate) struct Graph(sys::CUgraphExec);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `record`, destroyed once; the driver waits for a launch in flight.
        let _ = unsafe { graph::exec_destroy(self.0) };
    }
}

impl Device {
    /// Records what `work` enqueues, without running it. Every kernel and every plan of a product
    /// must have run once before: loading them is not allowed here.
    pub(crate) fn record(
        &self,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Graph, CudaError> {
        let own = self.cu_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives; the capture ends here whatever `work` returns; the template is
        // destroyed once.
        unsafe {
            stream::begin_capture(own, mode)?;
            let worked = work();
            let template = stream::end_capture(own)?;
            let ready = worked
                .and_then(|()| Ok(graph::instantiate(template, sys::CUgraphInstantiate_flags(0))?));
            graph::destroy(template)?;
            Ok(Graph(ready?))
        }
    }

    /// Enqueues a recorded sequence.
    pub(crate) fn replay(&self, recorded: &Graph) -> Result<(), CudaError> {
        // SAFETY: graph and stream live.
        unsafe { Ok(graph::launch(recorded.0, self.cu_stream())?) }
    }
}

/// Most shapes of work that one [`Recorder`] remembers.
const SHAPES: usize = 16;

/// Work of a few shapes that repeat: run as it is the first time, recorded the second time, replayed
/// from then on. A key stands for everything that launches depend on, addresses included.
#[derive(Default)]
pub(crate) struct Recorder(RefCell<HashMap<[u64; 5], State<Graph>>>);

#[derive(Debug, PartialEq)]
enum State<G> {
    Seen,
    Recorded(G),
    /// The driver does not record it, or has no memory for the recording.
    Unrecordable,
}

impl<G> State<G> {
    /// What follows, and whether the work was launched on the way; else it is to run as it is.
    fn advance(
        self,
        record: impl FnOnce() -> Option<G>,
        replay: impl FnOnce(&G) -> Result<(), CudaError>,
    ) -> (Self, Result<bool, CudaError>) {
        let graph = match self {
            Self::Recorded(graph) => Some(graph),
            Self::Seen => record(),
            Self::Unrecordable => None,
        };
        let Some(graph) = graph else { return (Self::Unrecordable, Ok(false)) };
        match replay(&graph) {
            // The first launch uploads the recording. None of it has run.
            Err(error) if error.is_memory() => (Self::Unrecordable, Ok(false)),
            launched => (Self::Recorded(graph), launched.map(|()| true)),
        }
    }
}

impl Recorder {
    /// Enqueues `work`; `forget` undoes what a recording that failed midway has left on the host.
    pub(crate) fn run(
        &self,
        device: &Device,
        key: [u64; 5],
        work: impl Fn() -> Result<(), CudaError>,
        forget: impl Fn(),
    ) -> Result<(), CudaError> {
        // Events around launches would be recorded too.
        if device.is_profiling() {
            return work();
        }
        let mut known = self.0.borrow_mut();
        if let Some(state) = known.remove(&key) {
            let record = || device.record(&work).inspect_err(|_| forget()).ok();
            let (next, launched) = state.advance(record, |graph| device.replay(graph));
            known.insert(key, next);
            if launched? {
                return Ok(());
            }
        } else {
            if known.len() == SHAPES {
                known.retain(|_, state| !matches!(state, State::Seen));
            }
            if known.len() < SHAPES {
                known.insert(key, State::Seen);
            }
        }
        drop(known);
        work()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: fn(&u8) -> Result<(), CudaError> =
        |_| Err(CudaError::Memory { what: "a graph".to_owned() });

    /// What follows a state where recording gives `graph`, and whether the work was launched.
    fn after(
        state: State<u8>,
        graph: Option<u8>,
        replay: fn(&u8) -> Result<(), CudaError>,
    ) -> (State<u8>, Option<bool>) {
        let (next, launched) = state.advance(|| graph, replay);
        (next, launched.ok())
    }

    #[test]
    fn what_cannot_be_recorded_or_replayed_for_lack_of_memory_runs_as_it_is() {
        use State::{Recorded, Seen, Unrecordable};
        assert_eq!(after(Seen, Some(1), |_| Ok(())), (Recorded(1), Some(true)));
        assert_eq!(after(Recorded(1), None, |_| Ok(())), (Recorded(1), Some(true)));
        assert_eq!(after(Seen, None, |_| Ok(())), (Unrecordable, Some(false)));
        assert_eq!(after(Seen, Some(1), FULL), (Unrecordable, Some(false)));
        assert_eq!(after(Recorded(1), None, FULL), (Unrecordable, Some(false)));
        assert_eq!(after(Unrecordable, Some(1), |_| Ok(())), (Unrecordable, Some(false)));
        let faulty = |_: &u8| Err(CudaError::Input("a fault of earlier work".to_owned()));
        assert_eq!(after(Recorded(1), None, faulty), (Recorded(1), None));
    }
}
