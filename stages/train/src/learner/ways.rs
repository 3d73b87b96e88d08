//! Ways to run a step in the memory there is: what a pass keeps, and how many tokens run at once.
//!
//! What is kept changes no bit. How many tokens run at once does: gradients are sums over them.

use contract::StageError;
use cuda::{Activations, CudaError};
use model::MicroBatch;

use crate::params;

/// A way to run micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) activations: Activations,
    /// Tokens that run at once; longer micro-batches are split between sequences.
    pub(crate) capacity: usize,
}

/// Start of a way as bytes.
const MAGIC: &[u8] = b"cuda-way";

impl Way {
    pub(crate) fn write(self, out: &mut Vec<u8>) {
        out.extend(MAGIC);
        out.push(match self.activations {
            Activations::Keep => 0,
            Activations::Recompute => 1,
            Activations::Offload => 2,
        });
        out.extend((self.capacity as u64).to_le_bytes());
    }

    /// What [`Way::write`] wrote, and the rest; `None` where it is something else.
    pub(crate) fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (kind, rest) = bytes.strip_prefix(MAGIC)?.split_first()?;
        let (capacity, rest) = rest.split_first_chunk::<8>()?;
        let activations = *KINDS.get(usize::from(*kind))?;
        let capacity = usize::try_from(u64::from_le_bytes(*capacity)).ok()?;
        Some((Self { activations, capacity }, rest))
    }

    /// The name of what is kept, as in the params.
    pub(crate) fn name(self) -> &'static str {
        match self.activations {
            Activations::Keep => "keep",
            Activations::Recompute => "recompute",
            Activations::Offload => "offload",
        }
    }
}

/// What may be kept, the fastest first, in the order of [`Way::write`].
const KINDS: [Activations; 3] = [Activations::Keep, Activations::Recompute, Activations::Offload];

/// Ways to run micro-batches of `batch` tokens in rows of up to `row`, the fastest first.
pub(crate) fn ways(choice: params::Activations, batch: usize, row: usize) -> Vec<Way> {
    let kinds = match choice {
        params::Activations::Keep => 0..1,
        params::Activations::Recompute => 1..2,
        params::Activations::Offload => 2..3,
        params::Activations::Auto => 0..3,
    };
    let mut ways = Vec::new();
    for activations in KINDS[kinds].iter().copied() {
        let mut capacity = batch;
        ways.push(Way { activations, capacity });
        while capacity > row {
            capacity = (capacity / 2).max(row);
            ways.push(Way { activations, capacity });
        }
    }
    ways
}

/// What `attempt` makes of the first way that fits into memory, else what the last one lacked. It
/// hears whether another way is left.
pub(crate) fn first_fit<T>(
    ways: &[Way],
    mut attempt: impl FnMut(Way, bool) -> Result<T, CudaError>,
) -> Result<T, CudaError> {
    let mut fault = CudaError::Input("there is no way to run a step".to_owned());
    for (index, way) in ways.iter().enumerate() {
        match attempt(*way, index + 1 < ways.len()) {
            Err(error) if error.is_memory() => fault = error,
            other => return other,
        }
    }
    Err(fault)
}

/// What to do where no way fits rows of `row` tokens.
pub(crate) fn no_room(error: CudaError, choice: params::Activations, row: usize) -> StageError {
    use params::Activations::{Auto, Keep, Offload, Recompute};
    let lower = "lower `max_length` of the stage that packs";
    let help = match (&error, choice) {
        (CudaError::HostMemory { .. }, Offload) => format!(
            "free memory of the host, set `activations: recompute`, which needs more of the GPU's instead, \
             or {lower}"
        ),
        // The last way is the one that offloads, and the GPU has no room for any other.
        (CudaError::HostMemory { .. }, Auto) => {
            format!("free memory of the host or of the GPU, or {lower}")
        }
        (CudaError::HostMemory { .. }, Keep | Recompute) => {
            format!("free memory of the host, or {lower}")
        }
        (CudaError::Memory { .. }, Keep) => format!("set `activations: recompute`, or {lower}"),
        (CudaError::Memory { .. }, Recompute) => format!("set `activations: offload`, or {lower}"),
        (CudaError::Memory { .. }, Auto | Offload) => format!("free memory of the GPU, or {lower}"),
        _ => return error.into(),
    };
    StageError::from(error).help(format!("not even one row of {row} tokens fits: {help}"))
}

/// Cuts a micro-batch between sequences into parts of at most `capacity` tokens, and hands them on
/// with bounds of their own.
pub(crate) fn split<E>(
    batch: MicroBatch<'_>,
    capacity: usize,
    mut each: impl FnMut(MicroBatch<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let bounds = batch.cu_seqlens;
    let mut first = 0;
    while first + 1 < bounds.len() {
        let start = bounds[first];
        let fits = |last: &usize| (bounds[*last] - start) as usize <= capacity;
        let last = (first + 1..bounds.len()).take_while(fits).last().unwrap_or(first + 1);
        let own: Vec<i32> = bounds[first..=last].iter().map(|b| b - start).collect();
        let range = start as usize..bounds[last] as usize;
        each(MicroBatch {
            tokens: &batch.tokens[range.clone()],
            cu_seqlens: &own,
            targets: &batch.targets[range],
        })?;
        first = last;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_micro_batch_are_whole_sequences_that_fit() {
        let tokens: Vec<i32> = (0..20).collect();
        let batch =
            MicroBatch { tokens: &tokens, cu_seqlens: &[0, 5, 8, 9, 17, 20], targets: &tokens };
        let mut parts = Vec::new();
        let each = |part: MicroBatch<'_>| -> Result<(), ()> {
            assert_eq!(part.tokens, part.targets);
            parts.push((part.tokens.to_vec(), part.cu_seqlens.to_vec()));
            Ok(())
        };
        split(batch, 9, each).unwrap();
        let expected: [(std::ops::Range<i32>, &[i32]); 3] =
            [(0..9, &[0, 5, 8, 9]), (9..17, &[0, 8]), (17..20, &[0, 3])];
        assert_eq!(parts.len(), expected.len());
        for ((tokens, bounds), (range, own)) in parts.iter().zip(expected) {
            assert_eq!((tokens, &bounds[..]), (&range.collect::<Vec<_>>(), own));
        }
    }

    fn full() -> CudaError {
        CudaError::Memory { what: "more".to_owned() }
    }

    #[test]
    fn what_is_smaller_comes_after_what_is_faster() {
        use Activations::{Keep, Offload, Recompute};
        let ways = ways(params::Activations::Auto, 5000, 2048);
        let expected = [
            (Keep, 5000),
            (Keep, 2500),
            (Keep, 2048),
            (Recompute, 5000),
            (Recompute, 2500),
            (Recompute, 2048),
            (Offload, 5000),
            (Offload, 2500),
            (Offload, 2048),
        ];
        let found: Vec<_> = ways.iter().map(|way| (way.activations, way.capacity)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn memory_that_lacks_on_either_side_leads_to_the_next_way() {
        let ways = ways(params::Activations::Auto, 4096, 2048);
        let mut tried = Vec::new();
        let found = first_fit(&ways, |way, is_another_left| {
            tried.push(is_another_left);
            match way.activations {
                Activations::Keep => Err(full()),
                Activations::Recompute => Err(CudaError::HostMemory { wanted: 1 }),
                Activations::Offload if way.capacity > 2048 => Err(full()),
                Activations::Offload => Ok(way.capacity),
            }
        });
        assert_eq!(found.unwrap(), 2048);
        assert_eq!(tried, [true, true, true, true, true, false]);
        let mut count = 0;
        let faulty = first_fit(&ways, |_, _| -> Result<(), _> {
            count += 1;
            Err(CudaError::Input("a fault".to_owned()))
        });
        assert!(matches!(faulty, Err(CudaError::Input(_))) && count == 1);
        assert!(first_fit(&ways, |_, _| Err::<(), _>(full())).unwrap_err().is_memory());
    }

    #[test]
    fn an_explicit_choice_hears_of_the_smaller_one() {
        let help = |choice| no_room(full(), choice, 512).help.unwrap();
        assert!(help(params::Activations::Keep).contains("`activations: recompute`, or lower"));
        assert!(help(params::Activations::Recompute).contains("`activations: offload`, or lower"));
        assert!(!help(params::Activations::Auto).contains("activations"));
        assert!(help(params::Activations::Auto).contains("512 tokens"));
        let other = no_room(CudaError::Input("a fault".to_owned()), params::Activations::Keep, 512);
        assert_eq!(other.help, None);
    }

    #[test]
    fn a_host_without_memory_is_not_asked_for_more() {
        use params::Activations::{Auto, Keep, Offload, Recompute};
        let lacking = || CudaError::HostMemory { wanted: 1 };
        let help = |choice| no_room(lacking(), choice, 512).help.unwrap();
        assert!(help(Offload).contains("set `activations: recompute`"));
        for choice in [Auto, Keep, Recompute] {
            assert!(help(choice).contains("free memory of the host"), "{choice:?}");
            assert!(!help(choice).contains("activations"), "{choice:?}");
        }
    }

    #[test]
    fn a_way_reads_back_and_other_bytes_are_none() {
        for way in ways(params::Activations::Auto, 4096, 2048) {
            let mut bytes = Vec::new();
            way.write(&mut bytes);
            bytes.push(7);
            assert_eq!(Way::read(&bytes), Some((way, &[7][..])));
            assert_eq!(Way::read(&bytes[..12]), None);
            bytes[MAGIC.len()] = 9;
            assert_eq!(Way::read(&bytes), None);
        }
        assert_eq!(Way::read(&1_000_000u64.to_le_bytes()), None);
    }
}
