package dendritefix

import (
	"math"

	"github.com/matrix-org/gomatrixserverlib/spec"
)

// MaxTimestamp is the latest time that Dendrite can give an event. It computes the time from nanoseconds in an int64, and a later one
// overflows.
//
// It can become the greatest integer of canonical JSON when spec.AsTimestamp calls UnixMilli.
const MaxTimestamp = spec.Timestamp(math.MaxInt64 / 1_000_000)
