// Package integration tests docs/protocol.md from the outside: it runs the real binary, over HTTP, on SQLite and on PostgreSQL.
//
// Without build tags it tests rule by rule, which takes minutes. The tag all adds tests that take long, that measure, or that need other
// programs or servers. The command go run ./test/all runs all of them, group by group.
package integration

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

const memberType = "m.call.member"

// soon is longer than any step of these tests takes, except the waits that have a duration of their own.
var soon = patience.For(time.Minute)

// pollInterval is the time between two checks of a condition.
const pollInterval = 40 * time.Millisecond

type JSON = homeserver.JSON

// binary is the path of the server's binary. withFailpoints builds the same server with failpoints, at which it can crash or fail.
var (
	binary         string
	withFailpoints = sync.OnceValues(func() (string, error) {
		dir := filepath.Join(filepath.Dir(binary), "failpoints")
		if err := os.Mkdir(dir, 0o700); err != nil {
			return "", err
		}
		return homeserver.Build(context.Background(), dir, "-tags", "failpoints")
	})
)

// atOnce is how many tests run at once. They mostly wait, so this is more than the number of processors.
const atOnce = "8"

func TestMain(m *testing.M) {
	_ = flag.Set("test.parallel", atOnce) // set before the command line is parsed, which may override it
	flag.Parse()
	dir, err := os.MkdirTemp("", "msc4140-integration-")
	if err == nil {
		// The race detector also checks the server under test.
		binary, err = homeserver.Build(context.Background(), dir, raceFlags...)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	say()
	postgres.Main(m, func() { _ = os.RemoveAll(dir) })
}

// database is one of the databases that all tests run on.
type database struct {
	name string
	// open returns the connection string of an empty database, as in homeserver.Config.
	open func(t testing.TB) string
}

// databases are those that this machine has. In CI it must have both.
var databases = func() []database {
	all := []database{{"SQLite", func(testing.TB) string { return "" }}, {"PostgreSQL", postgres.NewDatabase}}
	if postgres.Missing() != nil {
		return all[:1]
	}
	return all
}()

// say prints on the terminal which tests are left out. It writes to the terminal itself, because go test hides the output of packages
// whose tests pass.
func say() {
	line := leftOut
	if err := postgres.Missing(); err != nil {
		line += " NOT TESTED ON POSTGRESQL: " + err.Error()
	}
	if terminal, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0); err == nil && line != "" {
		_, _ = fmt.Fprintln(terminal, line)
		_ = terminal.Close()
	}
}

// unlimited is a configuration for tests that use tokens again and again.
var unlimited = map[string]any{"rate_limiting": JSON{"enabled": false}}

// onEachDatabase runs a test on each database, with a server of its own.
func onEachDatabase(t *testing.T, expiration map[string]any, test func(t *testing.T, s *server)) {
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel() // the tests mostly wait
			test(t, start(t, homeserver.Config{Postgres: db.open(t), Expiration: expiration}))
		})
	}
}

// gjsonKey quotes a key for a gjson path.
func gjsonKey(key string) string {
	var quoted []byte
	for i := range len(key) {
		if bytes.IndexByte([]byte(`.*?|#@!{}[]()=<>%\:`), key[i]) >= 0 {
			quoted = append(quoted, '\\')
		}
		quoted = append(quoted, key[i])
	}
	return string(quoted)
}

// eventually waits until a condition holds. It polls, because nothing announces the change.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	eventuallyWithin(t, soon, what, holds)
}

func eventuallyWithin(t *testing.T, d time.Duration, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !holds(); time.Sleep(pollInterval) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}
