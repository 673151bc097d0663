//go:build all

package integration

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// A hostile server blocks the roomserver in every room in which it has a user: each room's worker asks it for an event that does not
// exist, and gets no answer. Events that are due in those rooms are late, but others are not. A bystander's events in rooms without the
// hostile server are closed within two seconds of their deadlines.
func TestHostileServer(t *testing.T) {
	const (
		victims, roomsEach = 7, 10            // together more rooms than are closed at the same time
		life               = 20 * time.Second // longer than refreshing all of them takes
		perTransaction     = 50               // the limit of the specification
		before, watched    = 5 * time.Second, 25 * time.Second
		pause              = 200 * time.Millisecond
		bound              = 2 * time.Second
	)
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) { // not parallel: it measures times
			authority, err := homeserver.NewAuthority(t.TempDir())
			require.NoError(t, err)
			s := start(t, homeserver.Config{
				Postgres: db.open(t), Expiration: JSON{"rate_limiting": JSON{"enabled": false}, "max_running_per_user": 1000}, LogLevel: "warning",
				Federation: &homeserver.Federation{Host: "127.0.0.2", Authority: authority},
			})
			peer, err := homeserver.NewPeer("127.0.0.4", t.TempDir(), authority)
			require.NoError(t, err)
			t.Cleanup(func() { _ = peer.Close() })

			bystander := s.newUser(t)
			own := s.room(t, bystander)
			rooms := make([]*homeserver.PeerRoom, victims*roomsEach)
			users := make([]*user, len(rooms))
			var making errgroup.Group
			making.SetLimit(8)
			for v := range victims {
				u := s.newUser(t)
				for i := range roomsEach {
					making.Go(func() error {
						roomID, err := u.CreateRoom(t.Context(), nil)
						if err != nil {
							return err
						}
						users[v*roomsEach+i] = u
						rooms[v*roomsEach+i], err = peer.Join(t.Context(), s.Name, roomID)
						return err
					})
				}
			}
			require.NoError(t, making.Wait())

			usual := watchBystander(t, bystander, own, before, pause)
			tokens := make([]string, len(rooms))
			var sending errgroup.Group
			sending.SetLimit(8)
			for i, room := range rooms {
				sending.Go(func() error {
					tokens[i] = users[i].sendState(t, room.ID, "key", int(life.Seconds()), nil).token
					return nil
				})
			}
			require.NoError(t, sending.Wait())
			ready := keepAlive(t, s, tokens) // runs until all rooms are blocked
			for batch := range slices.Chunk(rooms, perTransaction) {
				require.NoError(t, peer.SendUponNothing(t.Context(), batch...))
			}
			eventually(t, "all rooms wait", func() bool { return peer.Asked() >= len(rooms) })
			ready()
			<-time.After(life)
			late := watchBystander(t, bystander, own, watched, pause)
			t.Logf("%d events: p50 %v, p99 %v; without the hostile server p50 %v, p99 %v",
				len(late), percentile(late, 50), percentile(late, 99), percentile(usual, 50), percentile(usual, 99))
			// The delay that a busy machine causes anyway is not the hostile server's fault.
			require.LessOrEqual(t, percentile(late, 99), bound+percentile(usual, 99))
		})
	}
}

// keepAlive keeps events alive until the returned function is called.
func keepAlive(t *testing.T, s *server, tokens []string) (end func()) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			var refreshing errgroup.Group
			refreshing.SetLimit(8)
			for _, token := range tokens {
				refreshing.Go(func() error {
					s.refreshed(t, token)
					return nil
				})
			}
			_ = refreshing.Wait()
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
			}
		}
	}()
	return func() {
		close(stop)
		<-stopped
	}
}

func percentile(all []time.Duration, p int) time.Duration {
	slices.Sort(all)
	return all[len(all)*p/100]
}

// watchBystander sends expiring messages, with the given pause between them. It returns how long after its deadline each closing event is
// seen.
func watchBystander(t *testing.T, u *user, roomID string, d, pause time.Duration) (late []time.Duration) {
	t.Helper()
	const life = 1
	follower := u.follow(t, roomID)
	sent := make(chan string, d/pause+1)
	go func() {
		defer close(sent)
		for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(pause) {
			sent <- u.sendMessage(t, roomID, life).eventID
		}
	}()
	closed := map[string]bool{}
	read := func() {
		for _, e := range follower.read(t, time.Second) {
			original := e.Get(`content.m\.relates_to.event_id`).Str
			if original == "" || closed[original] {
				continue
			}
			closed[original] = true
			late = append(late, time.Since(time.UnixMilli(e.Get("origin_server_ts").Int()))) // the closing event bears the deadline as its time
		}
	}
	var open []string
	for running := true; running || len(open) > 0; open = slices.DeleteFunc(open, func(id string) bool { return closed[id] }) {
		read()
		for more := true; running && more; {
			select {
			case id, ok := <-sent:
				if running = ok; ok {
					open = append(open, id)
				}
			default:
				more = false
			}
		}
	}
	return late
}
