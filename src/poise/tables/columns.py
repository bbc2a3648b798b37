"""Columns of a table: numbers and categories, and the types in which rows are returned.

Tables are arrays or frames (pandas, polars or another that narwhals reads). Inside, a row is the
numbers in their order, then a block of one-hot values for each categorical column. NaN is missing.
"""

from collections.abc import Sequence
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
from sklearn.utils import check_array

from poise.errors import InputError

DTYPES: Any = [np.float64, np.float32]
CATEGORIES = (nw.Categorical, nw.Enum, nw.String, nw.Boolean)
MOST_CATEGORIES = 255  # of a column; more are names or numbers of rows


class Columns:
    """The layout of a table's columns, found in the table of the fit.

    Args:
        X: an array-like or frame (rows, features).
        categorical: "from_dtype": columns of frames that hold texts, booleans or categories. A
            sequence of names, of indices, or of one boolean for each column. None: no column.

    Attributes:
        numeric, categorical: numbers of the columns, in order.
        levels: the categories of each categorical column, sorted, as the fit saw them.

    Raises:
        InputError: `categorical` names a column that the table lacks, or a column holds dates or
            lists, no observed value, or more than `MOST_CATEGORIES` categories.
    """

    def __init__(self, X: Any, categorical: Any) -> None:
        frame = frame_of(X)
        self.prototype: Any = None if frame is None else frame.head(0).to_native()
        self.names = None if frame is None else list(frame.columns)
        chosen = _chosen(X, frame, categorical)
        for column, name in enumerate(self.names or ()):
            if frame is not None and column not in chosen:
                _check_numeric(frame[:, column], name)
        self.plain = not chosen
        self.levels: list[np.ndarray] = []
        self.categorical = sorted(chosen)
        count = _count(X, frame)
        self.numeric = [column for column in range(count) if column not in chosen]
        for column in self.categorical:
            values = _objects(X, frame, column)
            try:
                known = {value for value in values if value is not None}
            except TypeError:
                raise InputError(
                    f"column {self.name(column)} holds lists or other objects: convert it to "
                    "numbers or texts, or leave it out"
                ) from None
            if not known:
                raise InputError(f"column {self.name(column)} has no observed value: leave it out")
            if len(known) > MOST_CATEGORIES:
                raise InputError(
                    f"column {self.name(column)} has {len(known)} categories, more than "
                    f"{MOST_CATEGORIES}: leave it out, or join rare ones"
                )
            try:
                ordered = sorted(known)
            except TypeError:  # texts beside numbers
                ordered = sorted(known, key=lambda value: (type(value).__name__, str(value)))
            levels = np.empty(len(ordered), object)
            levels[:] = ordered
            self.levels.append(levels)

    @property
    def sizes(self) -> list[int]:
        """Number of categories of each categorical column."""
        return [len(levels) for levels in self.levels]

    def name(self, column: int) -> str:
        return repr(self.names[column]) if self.names else str(column)

    def encoded(self, X: Any, **checks: Any) -> np.ndarray:
        """Return the rows of a table with categorical columns, (rows, numbers + categories).

        Args:
            X: as at the fit. Its columns have been checked.
            checks: options of scikit-learn's `check_array` for the numbers.

        Raises:
            InputError: a category was not seen by the fit.
        """
        frame = frame_of(X)
        if frame is not None:
            numbers: Any = frame[:, self.numeric].to_native()
        else:
            numbers = _objects_of(X)[:, self.numeric]
        if self.numeric:
            how: dict[str, Any] = {"dtype": np.float64, "ensure_all_finite": "allow-nan"} | checks
            numbers = check_array(with_nan(numbers), **how)
        else:
            numbers = np.empty((len(X), 0))
        blocks = [numbers]
        for column, levels in zip(self.categorical, self.levels, strict=True):
            codes = self._codes(_objects(X, frame, column), column, levels)
            hot = np.eye(len(levels))[codes.clip(0)]
            hot[codes < 0] = np.nan
            blocks.append(hot)
        return np.concatenate(blocks, 1)

    def _codes(self, values: np.ndarray, column: int, levels: np.ndarray) -> np.ndarray:
        numbers = {level: code for code, level in enumerate(levels)} | {None: -1}
        unseen = sorted({str(value) for value in values if value not in numbers})
        if unseen:
            shown = ", ".join(unseen[:3]) + (", ..." if len(unseen) > 3 else "")
            raise InputError(
                f"column {self.name(column)} has the category {shown}, which was not in the table "
                "of the fit: replace it by a missing value, or fit with it"
            )
        return np.array([numbers[value] for value in values], int)

    def table(
        self, numbers: np.ndarray, codes: np.ndarray, *, exact: bool, like: Any = None
    ) -> Any:
        """Return rows as a table of the kind and the column names of the fit.

        Args:
            numbers: (rows, numeric columns).
            codes: numbers of the categories, (rows, categorical columns).
            exact: return numbers in the columns' own types, rounded for integers and booleans.
                False: as floating-point numbers. Categories always have their own type.
            like: frame with the observed cells. If it is pandas, the rows get its index.

        Returns:
            A frame if the fit had a frame, else an array, of floating-point numbers or objects.
        """
        parts: dict[int, np.ndarray] = dict(zip(self.numeric, numbers.T, strict=True))
        for k, column in enumerate(self.categorical):
            parts[column] = self.levels[k][codes[:, k]]
        columns = [parts[column] for column in sorted(parts)]
        if self.prototype is None:
            if self.plain:
                return numbers
            mixed = np.empty((len(numbers), len(columns)), object)
            for column, values in enumerate(columns):
                mixed[:, column] = values
            of_numbers = all(isinstance(v, (int, float)) for part in self.levels for v in part)
            return mixed.astype(float) if of_numbers else mixed
        return self._frame(columns, exact, like)

    def _frame(self, columns: list[np.ndarray], exact: bool, like: Any) -> Any:
        assert self.names is not None
        schema = nw.from_native(self.prototype, eager_only=True).schema
        given = frame_of(like)
        data: dict[str, Any] = {}
        as_given: set[int] = set()  # columns of whole numbers whose given cells are not
        for k, (name, values) in enumerate(zip(self.names, columns, strict=True)):
            if exact and schema[name].is_integer():
                kind = np.dtype(str(schema[name]).lower())
                bounds = np.iinfo(kind)
                if given is not None and given[:, k].dtype.is_float():
                    own = given[:, k].to_numpy()
                    own = own[~np.isnan(own)]
                    if not ((own == own.round()) & (own >= bounds.min) & (own <= bounds.max)).all():
                        as_given.add(k)
                        data[name] = values
                        continue
                most = float(bounds.max)  # rounded up for 64 bits
                most = most if most <= bounds.max else np.nextafter(most, 0)
                values = np.round(values).clip(bounds.min, most).astype(kind)
                if given is not None and given[:, k].dtype.is_integer():
                    own = given[:, k]  # float64 would round large numbers
                    values = np.where(own.is_null(), values, own.fill_null(0).to_numpy())
            elif exact and schema[name] == nw.Boolean and values.dtype != object:
                values = values > 0.5
            data[name] = values.tolist() if values.dtype == object else values
        native: Any = nw.from_dict(
            data, backend=nw.get_native_namespace(self.prototype)
        ).to_native()
        typed = [k for k in range(len(columns)) if exact or k in self.categorical]
        wanted = [k for k in typed if k not in as_given]
        names = [self.names[k] for k in wanted]
        if hasattr(native, "astype"):  # pandas
            native = native.astype({name: self.prototype.dtypes[name] for name in names})
            return native.set_index(like.index) if hasattr(like, "iloc") else native
        cast = [nw.col(name).cast(schema[name]) for name in names]
        return nw.from_native(native, eager_only=True).with_columns(*cast).to_native()


def with_nan(table: Any) -> Any:
    """Return a table with NaN for the missing cells of columns of objects, such as pandas' NA."""
    objects = np.dtype(object)
    if isinstance(table, np.ndarray):
        if table.dtype != objects or table.ndim != 2 or not table.size:
            return table
        return np.where(np.vectorize(_is_missing, [bool])(table), np.nan, table)
    if not (hasattr(table, "iloc") and hasattr(table, "dtypes")):  # pandas has both
        return table
    names = [name for name, kind in table.dtypes.items() if kind == objects]
    if not names or not table[names].isna().any(axis=None):
        return table
    filled = table.copy(deep=False)
    filled[names] = table[names].where(table[names].notna(), np.nan)
    return filled


def frame_of(X: Any) -> nw.DataFrame[Any] | None:
    """Return a table as a frame of narwhals, or None if it is not a frame."""
    frame: Any = nw.from_native(X, eager_only=True, pass_through=True)
    return frame if isinstance(frame, nw.DataFrame) else None


def _count(X: Any, frame: nw.DataFrame[Any] | None) -> int:
    if frame is not None:
        return len(frame.columns)
    shape = np.asarray(X).shape
    return shape[1] if len(shape) == 2 else 0


def _chosen(X: Any, frame: nw.DataFrame[Any] | None, categorical: Any) -> set[int]:
    """Return the numbers of the categorical columns."""
    if isinstance(categorical, str) and categorical == "from_dtype":
        if frame is None:
            return set()
        return {k for k in range(len(frame.columns)) if _holds_categories(frame[:, k])}
    if categorical is None:
        return set()
    if isinstance(categorical, str) or not isinstance(categorical, (Sequence, np.ndarray)):
        raise InputError(
            'categorical_features must be "from_dtype", None or a list of names or indices of '
            f"columns, not {categorical!r}"
        )
    count = _count(X, frame)
    given = list(categorical)
    if given and all(isinstance(value, (bool, np.bool_)) for value in given):
        if len(given) != count:
            raise InputError(
                f"categorical_features has {len(given)} booleans, but the table has {count} "
                "columns: give one for each"
            )
        return {k for k, value in enumerate(given) if value}
    names = [] if frame is None else list(frame.columns)
    found = {names.index(value) if value in names else value for value in given}
    wrong = [v for v in found if not isinstance(v, (int, np.integer)) or not 0 <= v < count]
    if wrong:
        raise InputError(
            f"categorical_features names the column {wrong[0]!r}, but the table has "
            f"{', '.join(map(str, names)) or f'columns 0 to {count - 1}'}"
        )
    return {int(value) for value in found}


def _holds_categories(column: nw.Series[Any]) -> bool:
    if column.dtype == nw.Object:
        return any(isinstance(value, (str, bool)) for value in column.to_list())
    return column.dtype in CATEGORIES


def _check_numeric(column: nw.Series[Any], name: Any) -> None:
    """Raise InputError for a column of dates, lists or the like, which are no numbers."""
    kind: Any = column.dtype
    usable = kind.is_numeric() or kind in (*CATEGORIES, nw.Object, nw.Unknown)
    if kind in (nw.Object, nw.Unknown):
        for value in column.to_list():
            try:
                float(0 if _is_missing(value) else value)
            except (TypeError, ValueError):
                usable, kind = False, type(value).__name__
                break
    if not usable:
        raise InputError(
            f"column {name!r} holds {kind}: convert it to numbers or texts, or leave it out"
        )


def _objects_of(X: Any) -> np.ndarray:
    table = np.asarray(X)
    return table.astype(object) if table.ndim == 2 else table.reshape(len(table), -1)


def _objects(X: Any, frame: nw.DataFrame[Any] | None, column: int) -> np.ndarray:
    """Return the values of a column, (rows,), None where missing."""
    listed = _objects_of(X)[:, column].tolist() if frame is None else frame[:, column].to_list()
    values = np.empty(len(listed), object)
    values[:] = [None if _is_missing(value) else value for value in listed]
    return values


def _is_missing(value: Any) -> bool:
    """Return whether a cell is None, NaN, or pandas' NA, whose comparisons have no truth value."""
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True
