//go:build all

// Package hostile tests that users cannot harm the server or one another. It runs the real binary on SQLite and on PostgreSQL, with
// hostile users and a bystander. The bystander's timers must be closed in time whatever the hostile users do.
//
//	go test -tags all ./test/hostile -run TestFuzzThroughTimers -timers 200000 -longest 3h -database SQLite -timeout 4h -v
//	go test -tags all ./test/hostile -run TestHostileUsers -attack 15s -timeout 30m -v
package hostile

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

var (
	timersFlag   = flag.Int("timers", 1500, "how many `timers` TestFuzzThroughTimers asks for, on each database")
	longestFlag  = flag.Duration("longest", 2*time.Minute, "after which `time` TestFuzzThroughTimers sends no more inputs, on each database")
	seedFlag     = flag.Uint64("seed", 1, "the `seed` that TestFuzzThroughTimers derives its inputs from")
	onlyFlag     = flag.Uint64("only", 0, "run the input of this `index` alone, if it is not 0")
	keepFlag     = flag.Bool("keep", false, "write the inputs of findings into testdata/seeds")
	databaseFlag = flag.String("database", "", "test on this `database` only: SQLite or PostgreSQL")
	attackFlag   = flag.Duration("attack", 3*time.Second, "how long each attack of TestHostileUsers goes on")
)

// JSON is a JSON object.
type JSON = homeserver.JSON

// binary is the path of the homeserver's binary.
var binary string

func TestMain(m *testing.M) {
	flag.Parse()
	dir, err := os.MkdirTemp("", "msc4140-hostile-")
	if err == nil {
		binary, err = homeserver.Build(context.Background(), dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	postgres.Main(m, func() { _ = os.RemoveAll(dir) })
}

// database is one of the databases that all tests run on.
type database struct {
	name string
	// open returns the connection string of an empty database; "" means SQLite.
	open func(t testing.TB) string
}

var databases = []database{
	{"SQLite", func(testing.TB) string { return "" }},
	{"PostgreSQL", postgres.NewDatabase},
}

// onEachDatabase runs a test on each database that the flags select, one after the other, because concurrent tests would disturb the
// measurement of lateness.
func onEachDatabase(t *testing.T, test func(t *testing.T, db database)) {
	for _, db := range databases {
		if *databaseFlag == "" || *databaseFlag == db.name {
			t.Run(db.name, func(t *testing.T) { test(t, db) })
		}
	}
}

// server is a homeserver that the test can restart while requests are sent to it.
type server struct {
	*homeserver.Server
	// timers is the connection string of the timers' database; "" means an SQLite file.
	timers string
	// restarts is odd while the server is down on purpose. A request may fail if the value changes during it.
	restarts atomic.Int64
	// factor says how many times slower than the usual machine this one is, see measure.
	factor time.Duration
}

// start starts a homeserver with the given section "expiration". The server is stopped when the test ends.
func start(t *testing.T, db database, expiration JSON) *server {
	t.Helper()
	s := &server{timers: db.open(t)}
	cfg := homeserver.Config{Postgres: db.open(t), ExpirationDatabase: s.timers, Expiration: expiration, LogLevel: "info"} // see bystander.done
	var err error
	s.Server, err = homeserver.New(binary, t.TempDir(), cfg)
	require.NoError(t, err)
	require.NoError(t, s.Start(t.Context()))
	t.Cleanup(func() {
		s.Kill()
		if dir := os.Getenv("KEEP_LOGS"); t.Failed() && dir != "" {
			written, _ := s.Written()
			_ = os.WriteFile(filepath.Join(dir, "hostile-"+db.name+".log"), written, 0o600)
		}
	})
	return s
}

// restart stops or kills the server, and starts it again.
func (s *server) restart(t *testing.T, kill bool) {
	t.Helper()
	s.restarts.Add(1)
	defer s.restarts.Add(1)
	if !kill {
		s.terminate(t)
	}
	s.Kill()
	require.NoError(t, s.Start(t.Context()))
}

// terminate stops the server as an operator does. If that takes too long, it shows the server's goroutines.
func (s *server) terminate(t *testing.T) {
	t.Helper()
	const stopTimeout = 45 * time.Second
	require.NoError(t, syscall.Kill(s.Pid(), syscall.SIGTERM))
	select {
	case <-s.Ended():
	case <-time.After(stopTimeout):
		_ = syscall.Kill(s.Pid(), syscall.SIGQUIT)
		<-s.Ended()
		output, _ := os.ReadFile(filepath.Join(s.Dir, "output"))
		kept := filepath.Join(os.TempDir(), "hostile-goroutines")
		_ = os.WriteFile(kept, output, 0o600)
		t.Errorf("the server does not stop within %s after SIGTERM; its goroutines are in %s", stopTimeout, kept)
	}
}

// awaitUp waits while the server is down on purpose.
func (s *server) awaitUp(ctx context.Context) {
	for s.restarts.Load()%2 == 1 && ctx.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
}

// alive reports whether the process runs, or is down on purpose.
func (s *server) alive() bool {
	select {
	case <-s.Ended():
		return s.restarts.Load()%2 == 1
	default:
		return true
	}
}

// A request that takes longer than patience counts as hanging. After giveUp a client stops waiting for the answer.
const (
	patience = 10 * time.Second
	giveUp   = 20 * time.Second
)

// transport keeps enough connections for all users of the test.
var transport = &http.Client{
	Timeout:   giveUp,
	Transport: &http.Transport{MaxIdleConns: 1000, MaxIdleConnsPerHost: 1000},
}

// register makes accounts with a common prefix in their names.
func (s *server) register(t *testing.T, prefix string, n int) []*homeserver.Client {
	t.Helper()
	users := make([]*homeserver.Client, n)
	for i := range users {
		c, err := s.Register(t.Context(), fmt.Sprintf("%s%d", prefix, i))
		require.NoError(t, err)
		c.HTTP = transport
		users[i] = c
	}
	return users
}

// timersSize returns the size of the timers' database in bytes.
func (s *server) timersSize(t *testing.T) (size int64) {
	t.Helper()
	if s.timers != "" {
		return databaseSize(t, s.timers)
	}
	names, err := filepath.Glob(filepath.Join(s.Dir, "dendrite_expiration.db*"))
	require.NoError(t, err)
	for _, name := range names {
		if info, err := os.Stat(name); err == nil {
			size += info.Size()
		}
	}
	return size
}
