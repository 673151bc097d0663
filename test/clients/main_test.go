//go:build all

// Package clients tests delayed events with the clients that people use: the real binary, on SQLite, and matrix-js-sdk,
// upon which Element Call is built, and mautrix-go as they are published.
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

// soon is longer than anything takes here that is not waited for by its own clock.
var soon = patience.For(30 * time.Second)

// binary is the server.
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
