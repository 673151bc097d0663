//go:build all

package clients

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// service is a version of lk-jwt-service, which restarts and sends the leave events of participants.
type service struct {
	name string
	// act is its request for an action; the parameters are the delay ID, the action and the user, encoded.
	act string
	// exempt is set if no limit applies to its requests.
	exempt bool
}

var services = []service{
	{"in Go", `POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/%[1]s/%[2]s HTTP/1.1
Host: HOST
User-Agent: Go-http-client/1.1
Content-Length: 2
Content-Type: application/json
Accept-Encoding: gzip

{}`, false},
	{"in Rust", `POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/%[1]s/%[2]s HTTP/1.1
content-type: application/json
accept: */*
host: HOST
content-length: 2

{}`, false},
	{"in Rust, as an application service", `POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/%[1]s/%[2]s?user_id=%[3]s HTTP/1.1
content-type: application/json
authorization: Bearer as-token
accept: */*
host: HOST
content-length: 2

{}`, true},
}

// lookUp is how the service looks up an event as an application service; the parameters are the delay ID and the user, encoded.
const lookUp = `GET /_matrix/client/unstable/org.matrix.msc4140/delayed_events/%s?user_id=%s HTTP/1.1
authorization: Bearer as-token
accept: */*
host: HOST

`

// asService returns the registration file of the service.
func asService(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "lk-jwt-service.yaml")
	require.NoError(t, os.WriteFile(file, []byte(`
id: lk-jwt-service
url: null
as_token: as-token
hs_token: hs-token
sender_localpart: lk-jwt-service
namespaces: {users: [{exclusive: false, regex: "@.*"}]}
rate_limited: false
`), 0o600))
	return file
}

// The service has the delay ID of a user, and makes its calls byte for byte. It takes a 404 for send as done, gives up at a 404 for
// restart, and tries any other error but 429 again and again.
func TestServices(t *testing.T) {
	t.Parallel()
	server := start(t, homeserver.Config{
		AppServices: []string{asService(t)},
		Expiration:  homeserver.JSON{"rate_limiting": homeserver.JSON{"token": homeserver.JSON{"threshold": 5, "cooloff_ms": 5000}}},
	})
	alice, bob := register(t, server, "alice"), register(t, server, "bob")
	roomID, err := alice.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	for _, s := range services {
		t.Run(s.name, func(t *testing.T) {
			act := func(delayID, action string) homeserver.Response {
				t.Helper()
				return write(t, server, fmt.Sprintf(s.act, delayID, action, url.QueryEscape(alice.UserID)))
			}
			sent := later(t, alice, roomID, s.name, "sent")
			before := scheduled(t, alice)[sent].Get("running_since").Int()
			time.Sleep(2 * time.Millisecond) // the resolution of running_since is a millisecond
			answers(t, act(sent, "restart"))
			require.Greater(t, scheduled(t, alice)[sent].Get("running_since").Int(), before)
			require.Empty(t, textOf(t, alice, roomID, s.name))
			answers(t, act(sent, "send"))
			require.Equal(t, "sent", textOf(t, alice, roomID, s.name))
			answers(t, act(sent, "send"))
			refuses(t, act(sent, "restart"), 404, "M_NOT_FOUND")

			cancelled := later(t, alice, roomID, s.name, "cancelled")
			do(t, alice, http.MethodPost, unstableEvents+"/"+cancelled+"/cancel", nil)
			refuses(t, act(cancelled, "send"), 404, "M_NOT_FOUND")
			refuses(t, act(cancelled, "restart"), 404, "M_NOT_FOUND")
			refuses(t, act("unknown", "send"), 404, "M_NOT_FOUND")
			refuses(t, act("unknown", "restart"), 404, "M_NOT_FOUND")
			require.Equal(t, "sent", textOf(t, alice, roomID, s.name))

			often := later(t, alice, roomID, s.name, "restarted too often")
			var refused homeserver.Response
			for range 100 {
				if refused = act(often, "restart"); refused.Code != http.StatusOK {
					break
				}
			}
			if s.exempt {
				answers(t, refused)
				return
			}
			refuses(t, refused, 429, "M_LIMIT_EXCEEDED")
			seconds, err := strconv.Atoi(refused.Header.Get("Retry-After"))
			require.NoError(t, err)
			require.Equal(t, (refused.Get("retry_after_ms").Int()+999)/1000, int64(seconds))
			time.Sleep(time.Duration(seconds) * time.Second)
			answers(t, act(often, "restart"))
		})
	}

	t.Run("looks up a delay", func(t *testing.T) {
		delayID := later(t, alice, roomID, "looked up", "later")
		look := func(delayID string, user *homeserver.Client) homeserver.Response {
			t.Helper()
			return write(t, server, fmt.Sprintf(lookUp, delayID, url.QueryEscape(user.UserID)))
		}
		res := look(delayID, alice)
		require.Equal(t, http.StatusOK, res.Code, res)
		require.EqualValues(t, 3600000, res.Get("delay_ms").Int())
		require.Equal(t, roomID, res.Get("room_id").Str)
		require.Equal(t, delayID, res.Get("delay_id").Str)
		require.Equal(t, memberType, res.Get("type").Str)
		refuses(t, look(delayID, bob), 404, "M_NOT_FOUND")
		refuses(t, look("unknown", alice), 404, "M_NOT_FOUND")
	})
}

// A participant hands its leave event over to the service and does not restart it itself any more. The participant stays in the call as
// long as the service restarts the event, and leaves it when the service sends the event.
func TestServiceKeepsParticipant(t *testing.T) {
	var (
		stop    = make(chan struct{})
		stopped = make(chan error, 1)
	)
	c := begin(t, setting{restart: 5 * time.Minute, joined: func(c call) {
		go func() { stopped <- c.serve(t.Context(), stop) }()
	}})
	time.Sleep(c.delay + restart)
	c.unchanged(t)
	for len(c.alice.requests) > 0 { // a slow restart is tried again
		require.Equal(t, "restart", (<-c.alice.requests).Request)
	}
	gone := c.alice.signal(t, syscall.SIGKILL)
	close(stop)
	require.NoError(t, <-stopped)
	seen := c.bob.change(t)
	require.Equal(t, []string{c.bob.user}, seen.Members)
	require.WithinRange(t, seen.at, gone, gone.Add(promptly))
}

// serve restarts alice's leave event as lk-jwt-service does, until stop is closed, and sends it then.
func (c call) serve(ctx context.Context, stop <-chan struct{}) error {
	act := func(action string) error {
		res, err := exchange(c.server, fmt.Sprintf(services[0].act, c.scheduled.DelayID, action))
		if err == nil && res.Code != http.StatusOK {
			err = fmt.Errorf("%s: %s", action, res)
		}
		return err
	}
	for {
		select {
		case <-stop:
			return act("send")
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(restart):
			if err := act("restart"); err != nil {
				return err
			}
		}
	}
}
