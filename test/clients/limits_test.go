//go:build all

package clients

import (
	"fmt"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// limited returns the configuration of a server with other limits of delayed events.
func limited(expiration homeserver.JSON) homeserver.Config {
	return homeserver.Config{Expiration: expiration}
}

// obeys requires that the next request comes no earlier than the answer 429 told. It returns the answer to that request.
func (p *participant) obeys(t *testing.T, refused line) line {
	t.Helper()
	require.Equal(t, http.StatusTooManyRequests, refused.Status)
	require.Equal(t, "M_LIMIT_EXCEEDED", refused.Errcode)
	require.Positive(t, refused.RetryAfter)
	next := p.await(t, p.requests, "another try", func(line) bool { return true })
	// The lines are read a little after the requests.
	require.Greater(t, next.at.Sub(refused.at), time.Duration(refused.RetryAfter)*time.Second-500*time.Millisecond)
	return next
}

// Element Call asks for more than the server allows: an hour if a service restarts its leave event, or 18 seconds if it does that itself.
// matrix-js-sdk falls back to what the server allows.
func TestDelayTooLong(t *testing.T) {
	t.Parallel()
	for _, asked := range []time.Duration{time.Hour, 18 * time.Second} {
		t.Run(asked.String(), func(t *testing.T) {
			c := begin(t, setting{
				server: limited(homeserver.JSON{"delayed_events": homeserver.JSON{"max_delay": delay.String()}}),
				delay:  asked, joins: append([]string{"schedule 400"}, usualJoin...),
			})
			require.Equal(t, delay, c.delay)
			c.aliceStays(t)
			c.aliceVanishes(t, syscall.SIGKILL)
		})
	}
}

// Alice has as many delayed events as a user may have. Her client waits until the first of them is due, as it is told, and then joins with
// a leave event.
func TestTooManyScheduled(t *testing.T) {
	const first = 4 * time.Second
	var (
		users call // before anyone is in it
		once  sync.Once
		due   time.Time
	)
	c := begin(t, setting{
		server: limited(homeserver.JSON{"delayed_events": homeserver.JSON{"max_scheduled_per_user": 1}}),
		before: func(c call) { users = c },
		through: func(server string) string {
			return newProxy(t, server, func(req *http.Request) {
				if !req.URL.Query().Has("org.matrix.msc4140.delay") {
					return
				}
				once.Do(func() {
					path := homeserver.SendPath(users.roomID, "m.room.message")
					path = fmt.Sprintf("%s?org.matrix.msc4140.delay=%d", path, first.Milliseconds())
					if _, err := must(t.Context(), users.asAlice, http.MethodPut, path, homeserver.JSON{"body": "later"}); err != nil {
						t.Error(err)
					}
					due = time.Now().Add(first)
				})
			}).url
		},
		joins: []string{"schedule 429", "schedule 200", "join 200", "restart 200"},
	})
	require.WithinRange(t, c.scheduled.at, due.Add(-promptly), due.Add(2*promptly))
	c.aliceStays(t)
	c.aliceVanishes(t, syscall.SIGKILL)
}

// Alice's client restarts her leave event more often than the server allows. It waits as it is told, and she stays in the call.
func TestRestartsTooOften(t *testing.T) {
	limit := homeserver.JSON{"threshold": 1, "cooloff_ms": 3000}
	c := begin(t, setting{
		server:  limited(homeserver.JSON{"rate_limiting": homeserver.JSON{"user": limit}}),
		restart: 500 * time.Millisecond,
	})
	for began, refused := time.Now(), 0; time.Since(began) < c.delay || refused < 2; {
		answered := c.alice.await(t, c.alice.requests, "restart", func(line) bool { return true })
		for answered.Status == http.StatusTooManyRequests {
			refused++
			answered = c.alice.obeys(t, answered)
		}
		require.Equal(t, "restart", answered.Request)
		require.Equal(t, http.StatusOK, answered.Status)
	}
	c.unchanged(t)
	left := c.alice.tell(t, "leave")
	seen := c.bob.change(t)
	require.Equal(t, []string{c.bob.user}, seen.Members)
	require.WithinRange(t, seen.at, left, left.Add(3*time.Second+promptly))
}
