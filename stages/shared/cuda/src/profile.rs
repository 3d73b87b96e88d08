//! Device time by class of work, from events around launches.

use std::cell::RefCell;
use std::collections::BTreeMap;

use cudarc::driver::{result::event, sys};

use crate::CudaError;

/// Pairs of events; off unless asked for, since events cost launches.
#[derive(Default)]
pub(crate) struct Profile {
    spans: RefCell<Option<Vec<Span>>>,
}

/// Class, and the events around one piece of work.
type Span = (&'static str, sys::CUevent, sys::CUevent);

impl Profile {
    /// Starts collecting.
    pub(crate) fn start(&self) {
        *self.spans.borrow_mut() = Some(Vec::new());
    }

    /// Whether it collects.
    pub(crate) fn is_on(&self) -> bool {
        self.spans.borrow().is_some()
    }

    /// Runs `work`, timed as `class` where collecting.
    pub(crate) fn span<R>(
        &self,
        class: &'static str,
        stream: sys::CUstream,
        work: impl FnOnce() -> Result<R, CudaError>,
    ) -> Result<R, CudaError> {
        if !self.is_on() {
            return work();
        }
        let mark = || -> Result<sys::CUevent, CudaError> {
            let event = event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
            // SAFETY: event and stream live.
            unsafe { event::record(event, stream)? };
            Ok(event)
        };
        let start = mark()?;
        let result = work()?;
        let end = mark()?;
        if let Some(spans) = self.spans.borrow_mut().as_mut() {
            spans.push((class, start, end));
        }
        Ok(result)
    }

    /// Stops; milliseconds and launches by class. The stream must be idle.
    pub(crate) fn finish(&self) -> Result<BTreeMap<&'static str, (f64, usize)>, CudaError> {
        let mut table = BTreeMap::new();
        for (class, start, end) in self.spans.borrow_mut().take().unwrap_or_default() {
            // SAFETY: both were recorded on an idle stream; destroyed once.
            let time = unsafe {
                let time = elapsed(start, end)?;
                event::destroy(start)?;
                event::destroy(end)?;
                time
            };
            let entry: &mut (f64, usize) = table.entry(class).or_default();
            entry.0 += f64::from(time);
            entry.1 += 1;
        }
        Ok(table)
    }
}

/// Milliseconds between two events. cudarc would call a symbol that drivers have since CUDA 12.8 alone;
/// this one all have.
///
/// # Safety
/// Both were recorded, and not destroyed.
unsafe fn elapsed(start: sys::CUevent, end: sys::CUevent) -> Result<f32, CudaError> {
    type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
    let mut milliseconds = 0.0;
    // SAFETY: the driver's function of that name and type, on the caller's events.
    unsafe {
        let Ok(function) = sys::culib().get::<Elapsed>("cuEventElapsedTime".as_bytes()) else {
            return Err(CudaError::Library { library: "cuda" });
        };
        function(&raw mut milliseconds, start, end).result()?;
    }
    Ok(milliseconds)
}
