//! Streams beside the main one, and marks that order work between streams.

use std::sync::Arc;

use cudarc::driver::{
    CudaStream,
    result::{event, stream},
    sys,
};

use crate::CudaError;
use crate::device::{Buffer, Device, WORKSPACE};

/// A place in a stream that other streams can wait for.
pub(crate) struct Event(sys::CUevent);

impl Event {
    pub(crate) fn new() -> Result<Self, CudaError> {
        Ok(Self(event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?))
    }

    /// Marks the end of what `stream` has so far.
    pub(crate) fn record(&self, stream: sys::CUstream) -> Result<(), CudaError> {
        // SAFETY: event and stream live.
        unsafe { Ok(event::record(self.0, stream)?) }
    }

    /// Has `waiting` wait for the mark.
    pub(crate) fn hold(&self, waiting: sys::CUstream) -> Result<(), CudaError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream live.
        unsafe { Ok(stream::wait_event(waiting, self.0, flags)?) }
    }

    /// Waits for the mark here; not at all where nothing was marked.
    pub(crate) fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: the event lives.
        unsafe { Ok(event::synchronize(self.0)?) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; work that uses it goes on.
        let _ = unsafe { event::destroy(self.0) };
    }
}

/// A stream of low priority: its work fills the multiprocessors that the last tiles of a large product
/// on the main stream leave idle.
pub(crate) struct Lane {
    stream: Arc<CudaStream>,
    workspace: Buffer,
    reached: Event,
}

impl Lane {
    pub(crate) fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self {
            // The driver takes the nearest priority that it has.
            stream: device.context.new_stream_with_priority(1)?,
            workspace: device.alloc(WORKSPACE)?,
            reached: Event::new()?,
        })
    }

    /// Enqueues `work` here, after all that the main stream has so far, and marks its end.
    pub(crate) fn run(
        &self,
        device: &Device,
        done: &Event,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let own = self.stream.cu_stream();
        self.reached.record(device.cu_stream())?;
        self.reached.hold(own)?;
        device.redirected(own, self.workspace.ptr(), work)?;
        done.record(own)
    }
}
