//go:build all

package integration

import (
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// longAway is longer than the time after which a server tries again to reach one that was down for a few seconds.
var longAway = patience.For(90 * time.Second)

// pair is two servers that federate, and a room with users of both.
type pair struct {
	near, far *server
	// gate holds the requests of the far server to the near one.
	gate *homeserver.Gate
	// alice and bob are users of the near server, and carol is a user of the far server. Alice has created the room, and bob and carol are
	// moderators.
	alice, bob, carol *user
	roomID            string
}

// onEachPair runs a test with two servers of its own. The near one runs on each of the databases.
func onEachPair(t *testing.T, test func(t *testing.T, p *pair)) {
	for i, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			test(t, startPair(t, start, db, databases[(i+1)%len(databases)]))
		})
	}
}

// startPair starts two servers, the near one with startNear.
func startPair(t *testing.T, startNear func(*testing.T, homeserver.Config) *server, near, far database) *pair {
	t.Helper()
	authority, err := homeserver.NewAuthority(t.TempDir())
	require.NoError(t, err)
	gate, err := homeserver.NewGate("127.0.0.2")
	require.NoError(t, err)
	t.Cleanup(func() { _ = gate.Close() })
	at := func(host string, db database, gate *homeserver.Gate) homeserver.Config {
		return homeserver.Config{
			Postgres: db.open(t), Expiration: unlimited,
			Federation: &homeserver.Federation{Host: host, Authority: authority, Gate: gate},
		}
	}
	p := &pair{near: startNear(t, at("127.0.0.2", near, gate)), far: start(t, at("127.0.0.3", far, nil)), gate: gate}
	p.alice, p.bob, p.carol = p.near.newUser(t), p.near.newUser(t), p.far.newUser(t)
	p.roomID = p.newRoom(t, p.alice, p.bob, p.carol)
	return p
}

// newRoom makes a room. The first user creates it, and the others are moderators.
func (p *pair) newRoom(t *testing.T, users ...*user) string {
	t.Helper()
	return p.newRoomOf(t, "10", users...)
}

// newRoomOf is newRoom with a room version.
func (p *pair) newRoomOf(t *testing.T, version string, users ...*user) string {
	t.Helper()
	levels := JSON{users[0].UserID: 100}
	for _, u := range users[1:] {
		levels[u.UserID] = 50
	}
	roomID, err := users[0].CreateRoom(t.Context(), JSON{
		"room_version":                 version,
		"power_level_content_override": JSON{"users": levels, "events": JSON{memberType: 0}},
	})
	require.NoError(t, err)
	for _, u := range users[1:] {
		require.NoError(t, u.Join(t.Context(), roomID))
	}
	return roomID
}

// arrived waits until another user sees all events that this user sees in the room.
func (u *user) arrived(t *testing.T, roomID string, at *user) {
	t.Helper()
	follower := at.follow(t, roomID)
	follower.awaitEvent(t, u.must(t, http.MethodPut, homeserver.SendPath(roomID, "org.example.arrived"), JSON{}).Get("event_id").Str)
}

// suspend suspends a server's process. The server still accepts connections, but answers nothing.
func suspend(t *testing.T, s *server) {
	t.Helper()
	pid := s.Pid()
	require.NoError(t, syscall.Kill(pid, syscall.SIGSTOP))
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) }) // otherwise the process could not be stopped
}

func resume(t *testing.T, s *server) {
	t.Helper()
	require.NoError(t, syscall.Kill(s.Pid(), syscall.SIGCONT))
}
