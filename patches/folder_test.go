//go:build all

package patches_test

import (
	"context"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/patches"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

// A data folder of our own command also works with each line's command, and afterwards with our own again. Its rooms and timers survive
// both moves.
func TestDataFolderThereAndBack(t *testing.T) {
	own, err := homeserver.Build(t.Context(), t.TempDir())
	require.NoError(t, err)
	for _, line := range lines() {
		dir := copied(t, line)
		_, err := apply(dir)
		require.NoError(t, err)
		t.Setenv(homeserver.Tree, dir)
		other, err := homeserver.Build(t.Context(), t.TempDir())
		require.NoError(t, err)
		for name, open := range map[string]func(testing.TB) string{
			"SQLite": func(testing.TB) string { return "" }, "PostgreSQL": postgres.NewDatabase,
		} {
			t.Run(line.String()+" "+name, func(t *testing.T) {
				thereAndBack(t, own, other, line, homeserver.Config{Postgres: open(t)})
			})
		}
	}
}

func thereAndBack(t *testing.T, own, other string, line patches.Line, cfg homeserver.Config) {
	s, err := homeserver.New(own, t.TempDir(), cfg)
	require.NoError(t, err)
	require.NoError(t, s.Start(t.Context()))
	t.Cleanup(s.Kill)
	client, err := s.Register(t.Context(), "alice")
	require.NoError(t, err)
	alice := &user{client}
	roomID, err := alice.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	bob, err := s.Register(t.Context(), "bob")
	require.NoError(t, err)
	held, due := alice.expiring(t, roomID, "held", 600), alice.expiring(t, roomID, "due", 5)
	delayed := alice.delayed(t, roomID, "there")
	require.NoError(t, s.Stop())

	s.Use(other)
	require.NoError(t, s.Start(t.Context()))
	alice.await(t, roomID, "due", "expired")
	alice.keepAlive(t, "refresh", held, http.StatusOK)
	alice.keepAlive(t, "refresh", due, http.StatusNotFound)
	alice.act(t, delayed, "restart")
	alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), homeserver.JSON{"body": "from the other"})
	due, ended := alice.expiring(t, roomID, "due", 5), alice.expiring(t, roomID, "ended", 600)
	alice.keepAlive(t, "end", ended, http.StatusOK)
	if line == patches.Maintained { // a room that our server cannot read does not harm users outside of it
		_, err = bob.CreateRoom(t.Context(), homeserver.JSON{"room_version": "12"})
		require.NoError(t, err)
	}
	require.NoError(t, s.Stop())

	s.Use(own)
	require.NoError(t, s.Start(t.Context()))
	alice.await(t, roomID, "due", "expired")
	alice.await(t, roomID, "ended", "ended")
	alice.keepAlive(t, "refresh", due, http.StatusNotFound)
	alice.keepAlive(t, "end", held, http.StatusOK)
	alice.await(t, roomID, "held", "ended")
	alice.act(t, delayed, "send")
	require.Equal(t, http.StatusOK, alice.do(t, http.MethodGet, homeserver.StatePath(roomID, memberType, "there"), nil).Code)
	sync := alice.must(t, http.MethodGet, "/_matrix/client/v3/sync", nil)
	require.Contains(t, string(sync.Body), "from the other")
	require.NoError(t, s.Stop())
}

const memberType = "m.call.member"

// user is a client with assertions.
type user struct{ *homeserver.Client }

func (u *user) do(t *testing.T, method, path string, body any) homeserver.Response {
	t.Helper()
	res, err := u.Do(t.Context(), method, path, body)
	require.NoError(t, err)
	return res
}

func (u *user) must(t *testing.T, method, path string, body any) homeserver.Response {
	t.Helper()
	res := u.do(t, method, path, body)
	require.Equal(t, http.StatusOK, res.Code, "%s %s: %s", method, path, res)
	return res
}

// expiring sends an expiring state event and returns its token.
func (u *user) expiring(t *testing.T, roomID, stateKey string, seconds int) string {
	t.Helper()
	res := u.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, stateKey), homeserver.JSON{"m.will_expire": seconds})
	require.NotEmpty(t, res.Get("expire_refresh_token").Str)
	return res.Get("expire_refresh_token").Str
}

func (u *user) keepAlive(t *testing.T, method, token string, code int) {
	t.Helper()
	res, err := u.KeepAlive(t.Context(), method, token)
	require.NoError(t, err)
	require.Equal(t, code, res.Code, res)
}

// await waits until a state event is closed.
func (u *user) await(t *testing.T, roomID, stateKey, outcome string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience.For(time.Minute))
	defer cancel()
	for field := ""; field != outcome; time.Sleep(20 * time.Millisecond) {
		res, err := u.Do(ctx, http.MethodGet, homeserver.StatePath(roomID, memberType, stateKey), nil)
		require.NoError(t, err)
		field = gjson.GetBytes(res.Body, `m\.will_expire`).Str
	}
}

const unstable = "/_matrix/client/unstable/org.matrix.msc4140"

// delayed schedules a state event that is due in a long time, and returns its delay ID.
func (u *user) delayed(t *testing.T, roomID, stateKey string) string {
	t.Helper()
	path := homeserver.StatePath(roomID, memberType, stateKey) + "?org.matrix.msc4140.delay=600000"
	delayID := u.must(t, http.MethodPut, path, homeserver.JSON{}).Get("delay_id").Str
	require.NotEmpty(t, delayID)
	return delayID
}

func (u *user) act(t *testing.T, delayID, action string) {
	t.Helper()
	u.must(t, http.MethodPost, unstable+"/delayed_events/"+url.PathEscape(delayID)+"/"+action, nil)
}
