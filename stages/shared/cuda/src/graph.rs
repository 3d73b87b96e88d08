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
            let template = stream::end_capture(own);
            worked?;
            let template = template?;
            let ready = graph::instantiate(template, sys::CUgraphInstantiate_flags(0));
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
pub(crate) struct Recorder(RefCell<HashMap<[u64; 5], State>>);

enum State {
    Seen,
    Recorded(Graph),
    /// The driver does not record it.
    Unrecordable,
}

impl Recorder {
    /// Enqueues `work`.
    pub(crate) fn run(
        &self,
        device: &Device,
        key: [u64; 5],
        work: impl Fn() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        // Events around launches would be recorded too.
        if device.is_profiling() {
            return work();
        }
        let mut known = self.0.borrow_mut();
        match known.get(&key) {
            Some(State::Recorded(graph)) => return device.replay(graph),
            Some(State::Unrecordable) => {}
            Some(State::Seen) => {
                let recorded = device.record(&work);
                if let Ok(graph) = recorded {
                    device.replay(&graph)?;
                    known.insert(key, State::Recorded(graph));
                    return Ok(());
                }
                known.insert(key, State::Unrecordable);
            }
            None => {
                if known.len() == SHAPES {
                    known.retain(|_, state| !matches!(state, State::Seen));
                }
                if known.len() < SHAPES {
                    known.insert(key, State::Seen);
                }
            }
        }
        drop(known);
        work()
    }
}
