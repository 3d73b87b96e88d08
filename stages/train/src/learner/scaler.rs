//! Dynamic scaling of the loss for arithmetic in f16, whose smallest numbers are too large for
//! gradients: `torch.amp.GradScaler` with its defaults.

/// Scale of the first step.
const START: f32 = 65536.0;
/// Steps without overflow after which the scale doubles.
const INTERVAL: u32 = 2000;
/// A gradient that overflows at this scale does so by itself.
const LEAST: f32 = 1.0;

/// The scale of the loss, 1 where none is needed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LossScaler {
    scale: f32,
    /// Steps since the scale last changed.
    good_steps: u32,
    is_dynamic: bool,
}

impl LossScaler {
    /// A scaler for f16, else one that stays at 1.
    pub(crate) fn new(is_dynamic: bool) -> Self {
        Self { scale: if is_dynamic { START } else { 1.0 }, good_steps: 0, is_dynamic }
    }

    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }

    /// After a step whose gradient was finite.
    pub(crate) fn succeeded(&mut self) {
        self.good_steps += 1;
        if self.is_dynamic && self.good_steps == INTERVAL {
            self.scale *= 2.0;
            self.good_steps = 0;
        }
    }

    /// After a gradient that was not finite: false where no smaller scale would help.
    pub(crate) fn backs_off(&mut self) -> bool {
        if !self.is_dynamic || self.scale <= LEAST {
            return false;
        }
        self.scale *= 0.5;
        self.good_steps = 0;
        true
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.scale.to_le_bytes());
        out.extend(self.good_steps.to_le_bytes());
    }

    /// What [`LossScaler::write`] wrote, and the rest; `None` where it is of another kind of run.
    pub(crate) fn read<'a>(&self, bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (scale, rest) = bytes.split_first_chunk::<4>()?;
        let (good_steps, rest) = rest.split_first_chunk::<4>()?;
        let read = Self {
            scale: f32::from_le_bytes(*scale),
            good_steps: u32::from_le_bytes(*good_steps),
            is_dynamic: self.is_dynamic,
        };
        let fits = if self.is_dynamic {
            read.scale >= LEAST
        } else {
            read == Self { good_steps: read.good_steps, ..*self }
        };
        fits.then_some((read, rest))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests; scales are powers of two")]
mod tests {
    use super::*;

    #[test]
    fn scale_halves_on_overflow_and_doubles_after_2000_steps() {
        let mut scaler = LossScaler::new(true);
        assert!(scaler.backs_off());
        assert_eq!(scaler.scale(), 32768.0);
        (0..INTERVAL - 1).for_each(|_| scaler.succeeded());
        assert_eq!(scaler.scale(), 32768.0);
        let mut bytes = Vec::new();
        scaler.write(&mut bytes);
        bytes.push(7);
        let (mut read, rest) = LossScaler::new(true).read(&bytes).unwrap();
        assert_eq!((read, rest), (scaler, &[7][..]));
        read.succeeded();
        assert_eq!(read.scale(), 65536.0);
        assert_eq!(LossScaler::new(false).read(&bytes), None);
    }

    #[test]
    fn a_gradient_that_overflows_by_itself_is_no_matter_of_scale() {
        let mut scaler = LossScaler::new(true);
        let halvings = std::iter::from_fn(|| scaler.backs_off().then_some(())).count();
        assert_eq!(halvings, 16);
        let mut plain = LossScaler::new(false);
        assert!(!plain.backs_off());
        (0..2 * INTERVAL).for_each(|_| plain.succeeded());
        assert_eq!(plain.scale(), 1.0);
    }
}
