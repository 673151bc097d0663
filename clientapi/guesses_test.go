package clientapi

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

var once = expiration.RateLimit{Threshold: 1, Cooloff: time.Hour}

func TestGuessesAreLimitedByAddress(t *testing.T) {
	g := newGuesses(once, "")
	req := &http.Request{RemoteAddr: "192.0.2.1:1"}
	require.NoError(t, g.count(req))
	var tooMany *webapi.RateError
	require.ErrorAs(t, g.count(req), &tooMany)
	require.InDelta(t, time.Hour, tooMany.RetryAfter, float64(time.Minute))
	require.NoError(t, g.count(&http.Request{RemoteAddr: "192.0.2.2:1"}), "somebody else")
	off := newGuesses(expiration.RateLimit{}, "")
	for range 2 {
		require.NoError(t, off.count(req), "switched off")
	}
}
