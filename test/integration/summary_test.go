package integration

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// These tests check room summaries (MSC3266).

func summaryPath(roomIDOrAlias string, vias ...string) string {
	return "/_matrix/client/v1/room_summary/" + url.PathEscape(roomIDOrAlias) + "?" + url.Values{"via": vias}.Encode()
}

// roomWith makes a room with a join rule.
func (u *user) roomWith(t *testing.T, joinRule JSON, more ...JSON) string {
	t.Helper()
	return u.roomOf(t, "10", joinRule, more...)
}

// roomOf makes a room with a version and a join rule.
func (u *user) roomOf(t *testing.T, version string, joinRule JSON, more ...JSON) string {
	t.Helper()
	state := []JSON{{"type": "m.room.join_rules", "content": joinRule}}
	roomID, err := u.CreateRoom(t.Context(), JSON{
		"preset": "private_chat", "room_version": version, "initial_state": append(state, more...),
	})
	require.NoError(t, err)
	return roomID
}

func allow(roomIDs ...string) (all []JSON) {
	for _, roomID := range roomIDs {
		all = append(all, JSON{"type": "m.room_membership", "room_id": roomID})
	}
	return all
}

func TestRoomSummary(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		t.Run("Content", func(t *testing.T) { testSummaryContent(t, s) })
		t.Run("Access", func(t *testing.T) { testSummaryAccess(t, s) })
	})
}

// The summary has all fields, on all paths.
func testSummaryContent(t *testing.T, s *server) {
	alice, bob := s.newUser(t), s.newUser(t)
	space := alice.roomWith(t, JSON{"join_rule": "public"})
	roomID, err := alice.CreateRoom(t.Context(), JSON{
		"preset": "public_chat", "room_version": "10", "room_alias_name": "cheese", "name": "CHEESE", "topic": "Tasty",
		"creation_content": JSON{"type": "m.space"},
		"initial_state": []JSON{
			{"type": "m.room.avatar", "content": JSON{"url": "mxc://localhost/brie"}},
			{"type": "m.room.encryption", "content": JSON{"algorithm": "m.megolm.v1.aes-sha2"}},
			{"type": "m.room.history_visibility", "content": JSON{"history_visibility": "world_readable"}},
			{"type": "m.room.guest_access", "content": JSON{"guest_access": "can_join"}},
			{"type": "m.room.join_rules", "content": JSON{"join_rule": "restricted", "allow": allow(space)}},
		},
	})
	require.NoError(t, err)
	alias := alice.must(t, http.MethodGet, homeserver.StatePath(roomID, "m.room.canonical_alias", ""), nil).Get("alias").Str
	require.NotEmpty(t, alias)
	want := `"room_id":"` + roomID + `","name":"CHEESE","topic":"Tasty","avatar_url":"mxc://localhost/brie","canonical_alias":"` + alias + `",
		"num_joined_members":1,"guest_can_join":true,"world_readable":true,"join_rule":"restricted","allowed_room_ids":["` + space + `"],
		"room_type":"m.space","encryption":"m.megolm.v1.aes-sha2","room_version":"10"`
	const unstable = `,"im.nheko.summary.encryption":"m.megolm.v1.aes-sha2","im.nheko.summary.room_version":"10"`
	for _, name := range []string{roomID, alias} {
		for membership, u := range map[string]*user{`,"membership":"join"`: alice, `,"membership":"leave"`: bob, "": {s.Anonymous(), s}} {
			require.JSONEq(t, "{"+want+membership+"}", string(u.must(t, http.MethodGet, summaryPath(name), nil).Body))
			for _, path := range []string{"summary/" + url.PathEscape(name), "rooms/" + url.PathEscape(name) + "/summary"} {
				res := u.must(t, http.MethodGet, "/_matrix/client/unstable/im.nheko.summary/"+path, nil)
				require.JSONEq(t, "{"+want+membership+unstable+"}", string(res.Body))
			}
		}
	}
	// Fields without a value are absent.
	plain := alice.roomWith(t, JSON{"join_rule": "invite"})
	require.JSONEq(t, `{"room_id":"`+plain+`","num_joined_members":1,"guest_can_join":true,"world_readable":false,"join_rule":"invite",
		"room_version":"10","membership":"join"}`, string(alice.must(t, http.MethodGet, summaryPath(plain), nil).Body))
}

// A user gets the summary of a room if the user may join it, knock at it or read it, or is a member or invited. All others get a 404.
func testSummaryAccess(t *testing.T, s *server) {
	alice, bob, carol, dora := s.newUser(t), s.newUser(t), s.newUser(t), s.newUser(t)
	guest, err := s.RegisterGuest(t.Context())
	require.NoError(t, err)
	users := map[string]*user{
		"alice": alice, "bob": bob, "carol": carol, "dora": dora, "guest": {guest, s}, "anybody": {s.Anonymous(), s},
	}
	club := alice.roomWith(t, JSON{"join_rule": "public"})
	require.NoError(t, bob.Join(t.Context(), club))
	require.NoError(t, dora.Join(t.Context(), club))
	all := []string{"alice", "bob", "carol", "dora", "guest", "anybody"}
	readable := JSON{"type": "m.room.history_visibility", "content": JSON{"history_visibility": "world_readable"}}
	for _, test := range []struct {
		what string
		room string
		told []string
	}{
		{"public", alice.roomWith(t, JSON{"join_rule": "public"}), all},
		{"knock", alice.roomWith(t, JSON{"join_rule": "knock"}), all},
		{"knock_restricted", alice.roomWith(t, JSON{"join_rule": "knock_restricted", "allow": allow(club)}), all},
		{"readable", alice.roomWith(t, JSON{"join_rule": "invite"}, readable), all},
		{"invite", alice.roomWith(t, JSON{"join_rule": "invite"}), []string{"alice", "carol"}},
		{"restricted", alice.roomWith(t, JSON{"join_rule": "restricted", "allow": allow("!none:localhost", club)}), []string{"alice", "bob", "carol"}},
		{"knock before 7", alice.roomOf(t, "6", JSON{"join_rule": "knock"}), []string{"alice"}},
		{"restricted before 8", alice.roomOf(t, "7", JSON{"join_rule": "restricted", "allow": allow(club)}), []string{"alice"}},
		{"knock_restricted before 10", alice.roomOf(t, "9", JSON{"join_rule": "knock_restricted", "allow": allow(club)}), []string{"alice"}},
	} {
		if test.what == "invite" || test.what == "restricted" {
			alice.act(t, test.room, "invite", JSON{"user_id": carol.UserID})
			require.Equal(t, "invite", carol.must(t, http.MethodGet, summaryPath(test.room), nil).Get("membership").Str)
			alice.act(t, test.room, "ban", JSON{"user_id": dora.UserID})
		}
		for name, u := range users {
			res := u.do(t, http.MethodGet, summaryPath(test.room), nil)
			if slices.Contains(test.told, name) {
				require.Equal(t, http.StatusOK, res.Code, "%s: %s: %s", test.what, name, res)
				require.Equal(t, name != "anybody", res.Get("membership").Exists(), "%s: %s", name, res)
				continue
			}
			require.Equal(t, http.StatusNotFound, res.Code, "%s: %s: %s", test.what, name, res)
			require.Equal(t, string(u.do(t, http.MethodGet, summaryPath("!none:localhost"), nil).Body), string(res.Body),
				"there is nothing to tell whether the room exists")
		}
	}
	for _, nothing := range []string{"!none:localhost", "#none:localhost", "nonsense", "!", "#", "@alice:localhost"} {
		res := alice.do(t, http.MethodGet, summaryPath(nothing), nil)
		require.Equal(t, http.StatusNotFound, res.Code, nothing)
		require.Equal(t, "M_NOT_FOUND", res.Get("errcode").Str)
	}
	forger := &user{&homeserver.Client{URL: s.URL, Token: "forged"}, s}
	require.Equal(t, http.StatusUnauthorized, forger.do(t, http.MethodGet, summaryPath(club), nil).Code)

	// A room without members is not found.
	left := alice.roomWith(t, JSON{"join_rule": "public"})
	alice.act(t, left, "leave", JSON{})
	require.Equal(t, http.StatusNotFound, alice.do(t, http.MethodGet, summaryPath(left), nil).Code)
}

// Requests without a login are limited by address, whatever headers or connections they use. Requests with a login are limited by account.
func TestSummaryLimits(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{Expiration: JSON{"rate_limiting": JSON{"unknown_token": JSON{"threshold": 3, "cooloff_ms": 3600000}}}})
	alice := s.newUser(t)
	roomID := alice.roomWith(t, JSON{"join_rule": "public"})
	for name, u := range map[string]*user{"anybody": {s.Anonymous(), s}, "alice": alice} {
		var codes []int
		for i := range 6 {
			u.HTTP = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			codes = append(codes, u.do(t, http.MethodGet, summaryPath(roomID), nil, "X-Forwarded-For", fmt.Sprintf("203.0.113.%d", i)).Code)
		}
		require.Equal(t, []int{200, 200, 200, 429, 429, 429}, codes, name)
	}
}
