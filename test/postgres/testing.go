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

// Missing returns ErrNotInstalled on a machine without a PostgreSQL server, where tests leave PostgreSQL out. In CI, where the environment
// variable CI is set, it returns nil, so that Shared fails.
func Missing() error {
	if os.Getenv("CI") != "" {
		return nil
	}
	if _, err := findBinaries(); errors.Is(err, ErrNotInstalled) {
		return err
	}
	return nil
}

// Shared returns the cluster that all tests of this binary share; Main stops it. If PostgreSQL is missing, the test is skipped.
func Shared(t testing.TB) *Cluster {
	t.Helper()
	if err := Missing(); err != nil {
		t.Skipf("NOT TESTED ON POSTGRESQL: %s", err)
	}
	shared.once.Do(func() { shared.cluster, shared.err = Start(context.Background(), Unsafe...) })
	if shared.err != nil {
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

// Main runs a package's tests, stops the shared cluster, cleans up, and ends the process. The TestMain of a package that uses the shared
// cluster calls it.
func Main(m *testing.M, cleanup ...func()) {
	code := m.Run()
	for _, f := range cleanup {
		f()
	}
	if shared.cluster != nil {
		shared.cluster.Stop()
	}
	os.Exit(code)
}
