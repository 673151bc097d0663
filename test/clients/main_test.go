//go:build all

// Package clients tests delayed events with the clients that people use: matrix-js-sdk, which Element Call is built on, and mautrix-go,
// both as they are published. Of the Rust SDK and of lk-jwt-service it has the requests, byte for byte. The real binary runs on SQLite.
package clients

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// unstableEvents is the unstable path of delayed events.
const unstableEvents = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"

// soon is longer than any step of these tests takes, except the waits that have a duration of their own.
var soon = patience.For(30 * time.Second)

// binary is the path of the server's binary.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "msc4140-clients-")
	sdk.dir = filepath.Join(dir, "sdk")
	if err == nil {
		binary, err = homeserver.Build(context.Background(), dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// The tests of calls mostly wait, so that two cores can run more than two of them at the same time.
	flag.Parse()
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// start starts a homeserver for one test.
func start(t *testing.T, config homeserver.Config) *homeserver.Server {
	t.Helper()
	server, err := homeserver.New(binary, t.TempDir(), config)
	require.NoError(t, err)
	require.NoError(t, server.Start(t.Context()))
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}

// register makes an account.
func register(t *testing.T, server *homeserver.Server, name string) *homeserver.Client {
	t.Helper()
	user, err := server.Register(t.Context(), name)
	require.NoError(t, err)
	return user
}

// do makes a request that must be answered with 200.
func do(t *testing.T, c *homeserver.Client, method, path string, body any) homeserver.Response {
	t.Helper()
	res, err := must(t.Context(), c, method, path, body)
	require.NoError(t, err)
	return res
}

// must is do for other goroutines than the test's.
func must(ctx context.Context, c *homeserver.Client, method, path string, body any) (homeserver.Response, error) {
	res, err := c.Do(ctx, method, path, body)
	if err == nil && res.Code != http.StatusOK {
		err = fmt.Errorf("%s %s: %s", method, path, res)
	}
	return res, err
}

// scheduled returns the scheduled events of a user, by their delay IDs.
func scheduled(t *testing.T, user *homeserver.Client) map[string]gjson.Result {
	t.Helper()
	events, err := allScheduled(t.Context(), user)
	require.NoError(t, err)
	return events
}

func allScheduled(ctx context.Context, user *homeserver.Client) (map[string]gjson.Result, error) {
	res, err := must(ctx, user, http.MethodGet, unstableEvents, nil)
	events := map[string]gjson.Result{}
	for _, e := range res.Get("delayed_events").Array() {
		events[e.Get("delay_id").Str] = e
	}
	return events, err
}
