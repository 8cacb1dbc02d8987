//! Compiles the kernels of [`super::tile`] for an instruction set: a function per width, chosen by the tile.

/// Compiles the tiles of floats, and the limits, for an instruction set: `[width x panels ...]`, the panels being
/// those that run together.
macro_rules! float_tiles {
    ($lanes:ty, $($features:literal,)? [$($width:literal x $panels:literal)*]) => {
        /// # Safety
        /// As of the kernels' `run`.
        unsafe fn floats(tile: &crate::kernels::Tile) {
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn inner<const T: usize, const R: usize>(tile: &crate::kernels::Tile) {
                // SAFETY: the caller's.
                unsafe { crate::kernels::float_tile::floats::<$lanes, T, R>(tile) }
            }
            // SAFETY: the caller's tile has the width that the constant tells.
            unsafe {
                match tile.width {
                    $($width => inner::<$width, $panels>(tile),)*
                    width => unreachable!("a tile of {width} tokens"),
                }
            }
        }
        fn spin(what: crate::kernels::Arithmetic, turns: usize) -> f32 {
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn inner(what: crate::kernels::Arithmetic, turns: usize) -> f32 {
                // SAFETY: the table exists only where the instructions do.
                unsafe { crate::kernels::peak::spin::<$lanes>(what, turns) }
            }
            // SAFETY: as above.
            unsafe { inner(what, turns) }
        }
        fn soften(
            scores: &mut [f32],
            width: usize,
            cap: Option<f32>,
            queries: &mut [crate::kernels::Softening],
            highest: &mut [f32],
        ) {
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn inner(
                scores: &mut [f32],
                width: usize,
                cap: Option<f32>,
                queries: &mut [crate::kernels::Softening],
                highest: &mut [f32],
            ) {
                // SAFETY: the table exists only where the instructions do.
                unsafe { crate::kernels::soften::soften::<$lanes>(scores, width, cap, queries, highest) }
            }
            // SAFETY: as above.
            unsafe { inner(scores, width, cap, queries, highest) }
        }
        pub(super) const FLOATS: crate::kernels::FloatTiles =
            crate::kernels::FloatTiles {
                run: floats,
                widths: &[$($width),*],
                brain_widths: &[$($width),*],
                together: 1,
                spin,
                soften,
            };
    };
}
pub(crate) use float_tiles;

/// Compiles the tiles of codes, and reading, for an instruction set: `[width x panels ...]` as for floats.
macro_rules! code_tiles {
    ($lanes:ty, $($features:literal,)? [$($width:literal x $panels:literal)*]) => {
        /// # Safety
        /// As of the kernels' `run`.
        unsafe fn codes(tile: &crate::kernels::Tile) {
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn inner<
                const T: usize,
                const R: usize,
                const BITS: usize,
                const TABLE: bool,
                const SUB: usize,
                const MIN: bool,
            >(
                tile: &crate::kernels::Tile,
            ) {
                // SAFETY: the caller's.
                unsafe { crate::kernels::tile::codes::<$lanes, T, R, BITS, TABLE, SUB, MIN>(tile) }
            }
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn holes<const T: usize, const BITS: usize, const TABLE: bool, const PAIRED: bool>(
                tile: &crate::kernels::Tile,
            ) {
                // SAFETY: the caller's.
                unsafe { crate::kernels::holes::codes::<$lanes, T, BITS, TABLE, PAIRED>(tile) }
            }
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn opened<const T: usize, const SUB: usize, const MIN: bool, const WIDE: bool>(
                tile: &crate::kernels::Tile,
            ) {
                // SAFETY: the caller's.
                unsafe { crate::kernels::opened::codes::<$lanes, T, SUB, MIN, WIDE>(tile) }
            }
            unsafe fn of_form<const T: usize, const R: usize>(tile: &crate::kernels::Tile) {
                let crate::packed::Form::Codes(form) = tile.form else { return };
                if form.is_opened() {
                    // Where codes are unsigned anyway, both products are one.
                    let wide = form.is_wide() && <$lanes as crate::kernels::lanes::Lanes>::SIGNED;
                    // SAFETY: as below.
                    return unsafe {
                        match (form.sub, form.minimum, wide) {
                            (16, false, false) => opened::<T, 16, false, false>(tile),
                            (16, false, true) => opened::<T, 16, false, true>(tile),
                            (16, true, _) => opened::<T, 16, true, false>(tile),
                            (_, false, false) => opened::<T, 32, false, false>(tile),
                            (_, false, true) => opened::<T, 32, false, true>(tile),
                            (_, true, false) => opened::<T, 32, true, false>(tile),
                            (_, true, true) => opened::<T, 32, true, true>(tile),
                        }
                    };
                }
                if form.is_paired() {
                    // SAFETY: as below.
                    return unsafe {
                        match (form.bits, form.table) {
                            (2, Some(_)) => holes::<T, 2, true, true>(tile),
                            (3, Some(_)) => holes::<T, 3, true, true>(tile),
                            (_, Some(_)) => holes::<T, 4, true, true>(tile),
                            (2, _) => holes::<T, 2, false, true>(tile),
                            (3, _) => holes::<T, 3, false, true>(tile),
                            (4, _) => holes::<T, 4, false, true>(tile),
                            (5, _) => holes::<T, 5, false, true>(tile),
                            (6, _) => holes::<T, 6, false, true>(tile),
                            _ => holes::<T, 8, false, true>(tile),
                        }
                    };
                }
                if form.pattern.is_some() {
                    // SAFETY: as below.
                    return unsafe {
                        match form.bits {
                            4 => holes::<T, 4, false, false>(tile),
                            _ => holes::<T, 8, false, false>(tile),
                        }
                    };
                }
                // SAFETY: the constants are those of the form.
                unsafe {
                    match (form.bits, form.table, form.sub, form.minimum) {
                        (4, Some(_), 16, _) => inner::<T, R, 4, true, 16, false>(tile),
                        (4, Some(_), ..) => inner::<T, R, 4, true, 32, false>(tile),
                        (3, Some(_), 16, _) => inner::<T, R, 3, true, 16, false>(tile),
                        (3, Some(_), ..) => inner::<T, R, 3, true, 32, false>(tile),
                        (2, Some(_), ..) => inner::<T, R, 2, true, 32, false>(tile),
                        (2, _, 16, _) => inner::<T, R, 2, false, 16, true>(tile),
                        (3, _, 16, _) => inner::<T, R, 3, false, 16, false>(tile),
                        (6, _, 16, _) => inner::<T, R, 6, false, 16, false>(tile),
                        (2, _, _, false) => inner::<T, R, 2, false, 32, false>(tile),
                        (3, _, _, false) => inner::<T, R, 3, false, 32, false>(tile),
                        (4, _, _, false) => inner::<T, R, 4, false, 32, false>(tile),
                        (5, _, _, false) => inner::<T, R, 5, false, 32, false>(tile),
                        (6, _, _, false) => inner::<T, R, 6, false, 32, false>(tile),
                        (7, _, _, false) => inner::<T, R, 7, false, 32, false>(tile),
                        (8, _, _, false) => inner::<T, R, 8, false, 32, false>(tile),
                        (2, _, _, true) => inner::<T, R, 2, false, 32, true>(tile),
                        (3, _, _, true) => inner::<T, R, 3, false, 32, true>(tile),
                        (4, _, _, true) => inner::<T, R, 4, false, 32, true>(tile),
                        (5, _, _, true) => inner::<T, R, 5, false, 32, true>(tile),
                        (6, _, _, true) => inner::<T, R, 6, false, 32, true>(tile),
                        (7, _, _, true) => inner::<T, R, 7, false, 32, true>(tile),
                        _ => inner::<T, R, 8, false, 32, true>(tile),
                    }
                }
            }
            // SAFETY: the caller's tile has the width that the constant tells.
            unsafe {
                match tile.width {
                    $($width => of_form::<$width, $panels>(tile),)*
                    width => unreachable!("a tile of {width} tokens"),
                }
            }
        }
        fn pack_panel(storage: crate::Storage, cols: usize, rows: &[u8], out: &mut [u8]) {
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn inner(storage: crate::Storage, cols: usize, rows: &[u8], out: &mut [u8]) {
                // SAFETY: the table exists only where the instructions do.
                unsafe { crate::packed::pack_panel::<$lanes>(storage, cols, rows, out) }
            }
            // SAFETY: as above.
            unsafe { inner(storage, cols, rows, out) }
        }
        /// # Safety
        /// As of the kernels' `open`.
        unsafe fn open(form: crate::packed::Form, cols: usize, panel: *const u8, out: *mut u8) {
            /// # Safety
            /// As of the kernels' `open`.
            $(#[target_feature(enable = $features)])?
            unsafe fn inner(form: crate::packed::Form, cols: usize, panel: *const u8, out: *mut u8) {
                use crate::packed::Form;
                // SAFETY: the caller's.
                unsafe {
                    match form {
                        Form::Sparse(floats, _) => crate::kernels::holes::open::<$lanes>(floats, cols, panel, out),
                        _ => crate::kernels::opened::open::<$lanes>(form, form.length(cols), panel, out),
                    }
                }
            }
            // SAFETY: the table exists only where the instructions do, and the pointers are the caller's.
            unsafe { inner(form, cols, panel, out) }
        }
        fn pack_codes(
            x: &crate::Tensor,
            span: crate::packed::Span,
            kind: crate::packed::InputKind,
            out: &mut [u32],
        ) {
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn inner(
                x: &crate::Tensor,
                span: crate::packed::Span,
                kind: crate::packed::InputKind,
                out: &mut [u32],
            ) {
                // SAFETY: the table exists only where the instructions do.
                unsafe { crate::packed::pack_codes::<$lanes>(x, span, kind, out) }
            }
            // SAFETY: as above.
            unsafe { inner(x, span, kind, out) }
        }
        fn pack_words(rows: &[u32], cols: usize, width: usize, out: &mut [u32]) {
            /// # Safety
            /// As of the kernels' `run`.
            $(#[target_feature(enable = $features)])?
            unsafe fn inner(rows: &[u32], cols: usize, width: usize, out: &mut [u32]) {
                // SAFETY: the table exists only where the instructions do.
                unsafe { crate::packed::pack_words::<$lanes>(rows, cols, width, out) }
            }
            // SAFETY: as above.
            unsafe { inner(rows, cols, width, out) }
        }
        fn read(bytes: &[u8]) -> f32 {
            $(#[target_feature(enable = $features)])?
            unsafe fn inner(p: *const u8, len: usize) -> f32 {
                // SAFETY: the table exists only where the instructions do.
                unsafe { crate::kernels::peak::read::<$lanes>(p, len) }
            }
            // SAFETY: as above; the length is rounded down to whole turns.
            unsafe { inner(bytes.as_ptr(), bytes.len() / 512 * 512) }
        }
        pub(super) const CODES: crate::kernels::CodeTiles = crate::kernels::CodeTiles {
            run: codes,
            widths: &[$($width),*],
            busy: crate::kernels::tile::BUSY,
            signed: <$lanes as crate::kernels::lanes::Lanes>::SIGNED,
            pack_panel,
            opens_from: 16,
            open,
            pack_codes,
            pack_words,
            read,
        };
    };
}
pub(crate) use code_tiles;
