//go:build all

package integration

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

// A resource of the server is unavailable for a while. No answer is wrong, nothing is lost, and the server recovers by itself.

const (
	// actorsBefore is how long the actors act before the outage.
	actorsBefore = 3 * time.Second
	// outageTime is longer than most events of the actors live.
	outageTime = 4 * time.Second
)

// outage lets random clients act during an outage, and verifies all answers that they got.
func (s *server) outage(t *testing.T, begin, end func()) {
	t.Helper()
	l := newLedger()
	for range 3 {
		l.newActor(t, s, *seed)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, a := range l.actors {
		wg.Go(func() { a.actOn(ctx) })
	}
	wg.Go(func() { s.supervise(ctx) })
	<-time.After(actorsBefore)
	begin()
	<-time.After(outageTime)
	end()
	<-time.After(actorsBefore)
	cancel()
	wg.Wait()
	s.revive(t)
	faults := 0
	for _, a := range l.actors {
		faults += a.answers[http.StatusInternalServerError] + a.answers[noAnswer]
	}
	require.NotZero(t, faults, "there was no outage")
	l.verify(t, s)
}

// supervise starts the server again whenever it ends, as systemd does. Dendrite's components end the process when a database fails in the
// middle of a write. It returns when the context ends.
func (s *server) supervise(ctx context.Context) {
	for {
		select {
		case <-s.Ended():
			_ = s.Start(ctx) // repeated while the database is down
		case <-ctx.Done():
			return
		}
	}
}

// revive starts the server if it has ended.
func (s *server) revive(t *testing.T) {
	t.Helper()
	select {
	case <-s.Ended():
		require.NoError(t, s.Start(t.Context()))
	default:
	}
}

func TestPostgreSQLIsAway(t *testing.T) {
	t.Parallel()
	cluster, dsn := ownCluster(t)
	s := start(t, homeserver.Config{Postgres: dsn, Expiration: unlimited})
	s.outage(t, cluster.Pause, func() { require.NoError(t, cluster.Resume(t.Context())) })
}

// ownCluster starts a PostgreSQL server for one test, because pausing the shared one would disturb other tests.
func ownCluster(t *testing.T) (*postgres.Cluster, string) {
	t.Helper()
	postgres.Shared(t) // skips the test if there is no PostgreSQL
	cluster, err := postgres.Start(t.Context())
	require.NoError(t, err)
	t.Cleanup(cluster.Stop)
	dsn, err := cluster.NewDatabase(t.Context())
	require.NoError(t, err)
	return cluster, dsn
}

func TestDiskIsFull(t *testing.T) {
	dir := t.TempDir()
	// The file system is larger than SQLite's write-ahead log gets, so that only the ballast fills it.
	err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16m")
	if errors.Is(err, syscall.EPERM) && os.Getenv("CI") == "" {
		t.Skip("NOT TESTED WITH A FULL DISK: only root can mount a small one")
	}
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(dir, 0)) })
	database := "file:" + filepath.Join(dir, "dendrite_expiration.db")
	s := start(t, homeserver.Config{ExpirationDatabase: database, Expiration: unlimited})
	ballast := filepath.Join(dir, "ballast")
	s.outage(t, func() {
		emptyLog(t, database)
		f, err := os.Create(ballast)
		require.NoError(t, err)
		for block := make([]byte, 4096); err == nil; {
			_, err = f.Write(block)
		}
		require.ErrorIs(t, err, syscall.ENOSPC)
		_ = f.Close() // closing may fail too, because the disk is full
	}, func() { require.NoError(t, os.Remove(ballast)) })
}

// emptyLog truncates a database's write-ahead log. Otherwise SQLite would reuse the log's space on a full disk.
func emptyLog(t *testing.T, database string) {
	t.Helper()
	db, err := sqlutil.Open(&config.DatabaseOptions{ConnectionString: config.DataSource(database)}, nil)
	require.NoError(t, err)
	defer db.Close()
	require.Eventually(t, func() bool { // fails while the server reads or writes
		var busy, pages, written int
		err := db.QueryRowContext(t.Context(), "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &pages, &written)
		return err == nil && busy == 0
	}, soon, time.Millisecond)
}

func TestRoomserverRefuses(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			s.outage(t,
				func() { require.NoError(t, s.Failpoints(string(failpoint.BeforeInput)+" fail")) },
				func() { require.NoError(t, s.Failpoints()) })
		})
	}
}

// The consumer of the output stream is far behind. Only the stream reports changes that are not sends on this server. Until it does,
// tokens may be accepted, but no event may be closed that must not be.
func TestStreamIsBehind(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			alice, bob := s.newUser(t), s.newUser(t)
			roomID := s.room(t, alice, bob)
			require.NoError(t, s.Failpoints(string(failpoint.Stream)+" hold"))
			var dead []sent
			for _, life := range []int{briefly, 600} {
				redacted := alice.sendMessage(t, roomID, life)
				alice.must(t, http.MethodPut, "/_matrix/client/v3/rooms/"+url.PathEscape(roomID)+"/redact/"+
					url.PathEscape(redacted.eventID)+"/"+redacted.eventID[1:9], JSON{})
				carol := s.newUser(t)
				require.NoError(t, carol.Join(t.Context(), roomID))
				kicked := carol.sendState(t, roomID, carol.UserID, life, nil)
				alice.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/kick", JSON{"user_id": carol.UserID})
				dead = append(dead, redacted, kicked)
			}
			replaced := alice.sendState(t, roomID, "x", briefly, nil)
			bob.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "x"), JSON{"new": true})
			s.refused(t, replaced.token) // this does not depend on the stream

			control := bob.sendMessage(t, roomID, briefly)
			bob.follow(t, roomID).awaitClosing(t, control.eventID, "expired")
			for _, sent := range append(dead, replaced) {
				require.Empty(t, bob.closings(t, roomID, sent.eventID))
			}
			require.NoError(t, s.Failpoints())
			gone(t, s, bob, roomID, dead...)
		})
	}
}

// The wall clock is set back or forward. A running server still closes events after their full life. Across a restart only the wall clock
// counts. An event is then late by at most the time by which the clock was set back.
func TestClockIsSet(t *testing.T) {
	t.Parallel()
	for _, step := range []time.Duration{-time.Hour, time.Hour} {
		t.Run(step.String(), func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: databases[0].open(t), Expiration: unlimited})
			alice := s.newUser(t)
			roomID := s.room(t, alice)
			follower := alice.follow(t, roomID)
			const life, longer, back = 3, 15, 3 * time.Second
			asked := time.Now()
			left, held := alice.sendState(t, roomID, "left", life, nil), alice.sendState(t, roomID, "held", longer, nil)
			require.NoError(t, s.Failpoints("wall-clock step "+step.String()))
			s.refreshed(t, held.token)
			// The failpoint sets only the engine's clock. With the machine's clock, Dendrite would date its events by it, so the request sets the
			// time.
			late := sentBy(t, alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message")+
				"?ts="+strconv.FormatInt(time.Now().Add(step).UnixMilli(), 10), JSON{"m.will_expire": life}))
			follower.awaitClosing(t, left.eventID, "expired")
			requireLife(t, asked, life)
			requireSent := func(closing gjson.Result) { // by the current wall clock
				t.Helper()
				require.InDelta(t, time.Now().Add(step).UnixMilli(), closing.Get("origin_server_ts").Int(), float64(soon.Milliseconds()))
			}
			requireSent(follower.awaitClosing(t, late.eventID, "expired"))
			s.refreshed(t, held.token)
			refreshed := time.Now()
			closing := follower.awaitClosing(t, held.eventID, "expired")
			requireLife(t, refreshed, longer)
			if step > 0 {
				requireSent(closing)
			} else { // right after the original, because state resolution would prefer an original with a later time
				original := alice.event(t, roomID, held.eventID).Get("origin_server_ts").Int()
				require.Equal(t, original+1, closing.Get("origin_server_ts").Int())
			}

			// The deadline is stored by the current wall clock. First the clock does not change, then it is set back while the server is down.
			asked = time.Now()
			kept := alice.sendState(t, roomID, "kept", life, nil)
			s.restart(t, false)
			follower = alice.follow(t, roomID)
			follower.awaitClosing(t, kept.eventID, "expired")
			requireLife(t, asked, life)
			asked = time.Now()
			hung := alice.sendState(t, roomID, "hung", life, nil)
			require.NoError(t, s.Stop())
			require.NoError(t, s.Failpoints("wall-clock step "+(step-back).String()))
			require.NoError(t, s.Start(t.Context()))
			follower = alice.follow(t, roomID)
			follower.awaitClosing(t, hung.eventID, "expired")
			requireLife(t, asked.Add(back), life)
		})
	}
}

// requireLife requires that the given number of seconds has passed, and not many more.
func requireLife(t *testing.T, since time.Time, seconds int) {
	t.Helper()
	lived := time.Since(since)
	require.GreaterOrEqual(t, lived, time.Duration(seconds)*time.Second)
	require.Less(t, lived, time.Duration(seconds)*time.Second+soon)
}

// This is TestPostgreSQLIsAway step by step. It checks each answer while the database is down.
func TestDatabaseOutage(t *testing.T) {
	t.Parallel()
	cluster, dsn := ownCluster(t)
	s := start(t, homeserver.Config{Postgres: dsn, Expiration: unlimited})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	health := func() homeserver.Response {
		res, err := s.Anonymous().Do(t.Context(), http.MethodGet, "/_dendrite/monitor/health", nil)
		require.NoError(t, err)
		return res
	}
	require.Equal(t, http.StatusOK, health().Code)
	due, kept := alice.delayMessage(t, roomID, 3*time.Second, "due"), alice.delayMessage(t, roomID, time.Hour, "kept")
	expiring, held := alice.sendState(t, roomID, "expiring", 3, nil), alice.sendState(t, roomID, "held", 600, nil)
	// Dendrite's own consumers panic if the database fails while they write, so the test waits for them.
	alice.event(t, roomID, held.eventID)

	cluster.Pause()
	res := health()
	require.Equal(t, http.StatusServiceUnavailable, res.Code)
	require.Contains(t, res.Get("warnings").Raw, "expiration: cannot reach the database")
	for _, method := range []string{"refresh", "end"} {
		code, _ := s.keepAlive(t, method, held.token)
		require.GreaterOrEqual(t, code, 500, "a false promise")
	}
	f := &faulty{user: alice}
	f.fails(t, actions(kept, "restart"), actions(kept, "send"), actions(kept, "cancel"), lookups(kept), schedulings(roomID, time.Millisecond))
	<-time.After(4 * time.Second) // the deadline passes during the outage
	require.NoError(t, cluster.Resume(t.Context()))

	eventually(t, "health", func() bool { return health().Code == http.StatusOK })
	s.refreshed(t, held.token)
	alice.follow(t, roomID).awaitClosing(t, expiring.eventID, "expired")
	require.Len(t, alice.closings(t, roomID, expiring.eventID), 1)
	code, errcode := s.keepAlive(t, "end", held.token)
	require.Equal(t, http.StatusOK, code, errcode)
	require.NotEmpty(t, alice.finalised(t, due).Get("event_id").Str)
	require.Equal(t, []string{kept}, alice.scheduled(t))
}
