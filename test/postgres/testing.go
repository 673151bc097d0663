package postgres

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"
)

// shared is the cluster of a test binary.
var shared struct {
	once    sync.Once
	cluster *Cluster
	err     error
}

// Shared returns the cluster that all tests of this binary share; Main stops it. Without a PostgreSQL server on the
// machine the test is skipped, loudly, unless the environment variable CI is set: there it fails.
func Shared(t testing.TB) *Cluster {
	t.Helper()
	shared.once.Do(func() { shared.cluster, shared.err = Start(context.Background()) })
	switch {
	case errors.Is(shared.err, ErrNotInstalled) && os.Getenv("CI") == "":
		t.Skipf("NOT TESTED ON POSTGRESQL: %s", shared.err)
	case shared.err != nil:
		t.Fatalf("starting PostgreSQL: %s", shared.err)
	}
	return shared.cluster
}

// NewDatabase returns the connection string of an empty database for one test.
func NewDatabase(t testing.TB) string {
	t.Helper()
	dsn, err := Shared(t).NewDatabase(t.Context())
	if err != nil {
		t.Fatalf("creating a database: %s", err)
	}
	return dsn
}

// Main runs a package's tests, stops the shared cluster, cleans up, and ends the process. Packages that use the shared
// cluster call it from their TestMain.
func Main(m *testing.M, cleanup ...func()) {
	code := m.Run()
	for _, f := range cleanup {
		f()
	}
	if shared.cluster != nil {
		shared.cluster.Stop()
	}
	if errors.Is(shared.err, ErrNotInstalled) {
		say("\n*** NOT TESTED ON POSTGRESQL: " + shared.err.Error() + "\n\n")
	}
	os.Exit(code)
}

// say writes to the terminal, if there is one: go test shows nothing of what a package prints whose tests have passed.
func say(text string) {
	if terminal, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0); err == nil {
		defer terminal.Close()
		_, _ = terminal.WriteString(text)
		return
	}
	_, _ = os.Stderr.WriteString(text)
}
