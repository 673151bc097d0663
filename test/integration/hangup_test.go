package integration

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// A refresh hangs, and its client gives up and tries again, many times: whoever has hung up costs nothing more. When it goes on, the next
// refresh is good.
func TestKeepAlivesThatHangUp(t *testing.T) {
	t.Parallel()
	s := startWithFailpoints(t, homeserver.Config{Expiration: unlimited})
	alice := s.newUser(t)
	sent := alice.sendMessage(t, s.room(t, alice), 600)
	before, err := s.usage(t.Context())
	require.NoError(t, err)
	require.NoError(t, s.Failpoints(string(failpoint.BeforeRefresh)+" hold"))
	const clients, tries, patience, few = 100, 3, time.Second, 30
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range tries {
				ctx, hangUp := context.WithTimeout(t.Context(), patience)
				_, _ = s.Anonymous().KeepAlive(ctx, "refresh", sent.token)
				hangUp()
			}
		})
	}
	wg.Wait()
	require.Eventually(t, func() bool {
		now, err := s.usage(t.Context())
		return err == nil && now.goroutines < before.goroutines+few
	}, soon, 100*time.Millisecond, "requests of clients who have hung up are still waiting")
	require.NoError(t, s.Failpoints())
	code, _ := s.keepAlive(t, "refresh", sent.token)
	require.Equal(t, http.StatusOK, code)
}
