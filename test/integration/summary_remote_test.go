//go:build all

package integration

import (
	"net/http"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"
)

// The summary of a room that this server is not in comes from another server: one that the request names, or the one with the alias. Only
// users with an account get it.
func TestRemoteRoomSummary(t *testing.T) {
	t.Parallel()
	onEachPair(t, func(t *testing.T, p *pair) {
		club := p.carol.roomWith(t, JSON{"join_rule": "public"})
		p.alice.joinBy(t, club, p.far)
		public, err := p.carol.CreateRoom(t.Context(), JSON{"preset": "public_chat", "name": "far", "room_alias_name": "far"})
		require.NoError(t, err)
		restricted := p.carol.roomWith(t, JSON{"join_rule": "restricted", "allow": allow(club)})
		secret := p.carol.roomWith(t, JSON{"join_rule": "invite"})

		far := p.far.Name
		res := p.alice.must(t, http.MethodGet, summaryPath(public, "127.0.0.9:1", "not a server", p.near.Name, far), nil)
		require.Equal(t, "far", res.Get("name").Str)
		require.Equal(t, "leave", res.Get("membership").Str)
		require.Equal(t, "public", res.Get("join_rule").Str)
		require.Equal(t, int64(1), res.Get("num_joined_members").Int())
		require.Equal(t, public, p.alice.must(t, http.MethodGet, summaryPath("#far:"+far), nil).Get("room_id").Str)

		res = p.alice.must(t, http.MethodGet, summaryPath(restricted, far), nil)
		require.Equal(t, club, res.Get("allowed_room_ids.0").Str)
		guest, err := p.near.RegisterGuest(t.Context())
		require.NoError(t, err)
		for _, test := range []struct {
			u    *user
			path string
		}{
			{p.bob, summaryPath(restricted, far)}, // not a member of the club
			{p.alice, summaryPath(secret, far)}, {p.alice, summaryPath(public)}, {p.alice, summaryPath("#none:" + far)},
			{&user{p.near.Anonymous(), p.near}, summaryPath(public, far)}, {&user{guest, p.near}, summaryPath(public, far)},
			{&user{p.near.Anonymous(), p.near}, summaryPath("#far:" + far)},
		} {
			require.Equal(t, http.StatusNotFound, test.u.do(t, http.MethodGet, test.path, nil).Code, test.path)
		}
	})
}

// joinBy joins a room by way of another server.
func (u *user) joinBy(t *testing.T, roomID string, via *server) {
	t.Helper()
	u.must(t, http.MethodPost, "/_matrix/client/v3/join/"+url.PathEscape(roomID)+"?server_name="+url.QueryEscape(via.Name), JSON{})
}
