package integration

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// Clients can read that delayed events work, and the limits, before they use them. TestSameAsStock checks that these answers otherwise
// equal those of stock Dendrite.
func TestDelayedEventsAreAdvertised(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{})
	guest, err := s.RegisterGuest(t.Context())
	require.NoError(t, err)

	res, err := s.Anonymous().Do(t.Context(), http.MethodGet, "/_matrix/client/versions", nil)
	require.NoError(t, err)
	for _, feature := range []string{`org\.matrix\.msc4140`, `org\.matrix\.msc4140\.stable`} {
		require.Equal(t, gjson.True, res.Get("unstable_features."+feature).Type, res)
	}
	for _, user := range []*homeserver.Client{s.newUser(t).Client, guest} {
		for _, version := range []string{"v3", "r0"} {
			res, err := user.Do(t.Context(), http.MethodGet, "/_matrix/client/"+version+"/capabilities", nil)
			require.NoError(t, err)
			require.Equal(t, http.StatusOK, res.Code)
			for _, capability := range []string{`m\.delayed_events`, `org\.matrix\.msc4140\.delayed_events`} {
				require.JSONEq(t, `{"max_delay_ms":86400000,"max_scheduled":100}`, res.Get("capabilities."+capability).Raw, res)
			}
		}
	}
	written, err := s.Written()
	require.NoError(t, err)
	require.False(t, bytes.Contains(written, []byte("unknown MSC")), "the operator is not warned of what he has not configured")
}
