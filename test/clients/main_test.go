//go:build all

// Package clients tests delayed events with the clients that people use: matrix-js-sdk, which Element Call is built on, and mautrix-go,
// both as they are published. The real binary runs on SQLite.
package clients

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

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
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// start starts a homeserver for one test.
func start(t *testing.T) *homeserver.Server {
	t.Helper()
	server, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
	require.NoError(t, err)
	require.NoError(t, server.Start(t.Context()))
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return server
}
