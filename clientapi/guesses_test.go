package clientapi

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

var once = expiration.RateLimit{Threshold: 1, Cooloff: time.Hour}

func TestKnownTokensAreNotLimitedByAddress(t *testing.T) {
	g := newGuesses(once, "")
	req := &http.Request{RemoteAddr: "192.0.2.1:1"}
	require.NoError(t, g.mayAsk(req, false, 0))
	var limited *rateError
	require.ErrorAs(t, g.mayAsk(req, false, 0), &limited)
	require.InDelta(t, time.Hour, limited.retryAfter, float64(time.Minute))
	require.NoError(t, g.mayAsk(req, true, 0))
	require.ErrorAs(t, g.mayAsk(req, true, time.Second), &limited)
	require.Equal(t, time.Second, limited.retryAfter)
	require.NoError(t, g.mayAsk(&http.Request{RemoteAddr: "192.0.2.2:1"}, false, 0), "somebody else")
	off := newGuesses(expiration.RateLimit{}, "")
	for range 2 {
		require.NoError(t, off.mayAsk(req, false, 0), "switched off")
	}
}
