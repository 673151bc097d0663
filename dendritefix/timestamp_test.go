package dendritefix

import (
	"testing"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"
)

func TestMaxTimestamp(t *testing.T) {
	require.Equal(t, MaxTimestamp, spec.AsTimestamp(MaxTimestamp.Time()))
	require.NotEqual(t, MaxTimestamp+1, spec.AsTimestamp((MaxTimestamp + 1).Time()), "MaxTimestamp can be greater now")
}
