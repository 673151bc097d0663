//go:build all

package integration

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// stockPkg is Dendrite's own command, in the version that this module depends on.
const stockPkg = "github.com/matrix-org/dendrite/cmd/dendrite"

// Requests without the field are answered as by stock Dendrite. The test sends the same requests to both servers and compares the answers.
func TestSameAsStock(t *testing.T) {
	stock := filepath.Join(t.TempDir(), "dendrite")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", stock, stockPkg).CombinedOutput()
	require.NoError(t, err, "%s", out)

	var answers [2][]answer
	for i, binary := range []string{stock, binary} {
		hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
		require.NoError(t, err)
		require.NoError(t, hs.Start(t.Context()))
		t.Cleanup(hs.Kill)
		answers[i] = ask(t, &server{Server: hs})
	}
	require.Equal(t, len(answers[0]), len(answers[1]))
	for i := range answers[0] {
		require.Equal(t, answers[0][i], answers[1][i])
	}
}

// answer is an answer without the parts that differ between servers.
type answer struct {
	request, body string
	code          int
	header        map[string]string
}

var (
	eventIDs = regexp.MustCompile(`\$[A-Za-z0-9_-]{43}`)
	roomIDs  = regexp.MustCompile(`!\w+:localhost`)
	numbers  = regexp.MustCompile(`"(origin_server_ts|age)":\d+`)
	// advertised matches the features that only this server advertises.
	advertised = regexp.MustCompile(`,"(m|org\.matrix\.msc4140)\.delayed_events":\{[^}]*\}`)
)

// ask sends requests of all kinds without the field.
func ask(t *testing.T, s *server) (answers []answer) {
	alice, bob, stranger := s.newUser(t), s.newUser(t), s.newUser(t)
	client, err := s.RegisterGuest(t.Context())
	require.NoError(t, err)
	users := map[string]*homeserver.Client{
		"alice": alice.Client, "bob": bob.Client, "stranger": stranger.Client, "guest": client,
		"nobody": s.Anonymous(), "forger": {URL: s.URL, Token: "forged"},
	}
	roomID := s.room(t, alice, bob)
	send, state := "/_matrix/client/v3/rooms/"+roomID+"/send", "/_matrix/client/v3/rooms/"+roomID+"/state"
	do := func(who, method, path string, body []byte) {
		res, err := users[who].Do(context.Background(), method, path, body)
		require.NoError(t, err)
		a := answer{
			request: roomIDs.ReplaceAllString(who+" "+method+" "+path+" "+string(body[:min(len(body), 80)]), "!room"),
			code:    res.Code, header: map[string]string{},
			body: numbers.ReplaceAllString(roomIDs.ReplaceAllString(eventIDs.ReplaceAllString(
				advertised.ReplaceAllString(string(res.Body), ""), "$$event"), "!room"), ""),
		}
		for _, name := range []string{"Content-Type", "Access-Control-Allow-Origin", "Access-Control-Allow-Methods", "Access-Control-Allow-Headers", "Retry-After"} {
			a.header[name] = res.Header.Get(name)
		}
		answers = append(answers, a)
	}
	good, large := []byte(`{"body":"x"}`), []byte(`{"body":"`+strings.Repeat("x", 70000)+`"}`)
	for i, body := range [][]byte{
		good, []byte(`{}`), nil, []byte(`{`), []byte(`[]`), []byte(`"x"`), []byte(`null`), []byte("{\"a\":\"\xff\"}"), large,
		[]byte(`{"a":1.5}`), []byte(`{"a":9007199254740993}`), []byte(`{"a":"\u0000"}`), []byte(`{"m.will_expired":1}`),
	} {
		do("alice", http.MethodPut, fmt.Sprintf("%s/m.room.message/body%d", send, i), body)
		do("alice", http.MethodPut, state+"/org.example/key", body)
	}
	for _, who := range []string{"alice", "bob", "stranger", "guest", "nobody", "forger"} {
		do(who, http.MethodPut, send+"/m.room.message/txn-"+who, good)
		do(who, http.MethodPut, send+"/m.room.message/txn-"+who, []byte(`{"body":"a retry with another body"}`))
		do(who, http.MethodPost, send+"/m.room.message", good)
		do(who, http.MethodPut, state+"/m.room.name/", []byte(`{"name":"x"}`))
		do(who, http.MethodPut, state+"/m.room.name", []byte(`{"name":"x"}`)) // the same content again
		do(who, http.MethodPut, state+"/m.call.member/"+who, good)
		do(who, http.MethodPut, state+"/m.call.member/@"+who+"%3Alocalhost", good)
		do(who, http.MethodPut, "/_matrix/client/r0/rooms/"+roomID+"/send/m.room.message/r0-"+who, good)
		do(who, http.MethodPut, "/_matrix/client/v3/rooms/!none:localhost/send/m.room.message/1", good)
		do(who, http.MethodPut, "/_matrix/client/v3/rooms/nonsense/state/m.call.member", good)
		for _, version := range []string{"v3", "r0", "v1", "unstable"} {
			for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodOptions} {
				do(who, method, "/_matrix/client/"+version+"/capabilities", nil)
			}
		}
	}
	for _, path := range []string{
		send + "/m.room.message/ts?ts=x", send + "/m.room.message/%2F%25", send + "/a%2Fb/c", state + "/a%2Fb/c%2Fd", state + "/m.room.tombstone",
		state + "/m.room.canonical_alias", send + "/" + strings.Repeat("t", 300) + "/1", state + "/m.call.member/" + strings.Repeat("k", 300),
		state + "/x/y/z", send + "/x/y/z", send,
	} {
		do("alice", http.MethodPut, path, []byte(`{"body":"x","replacement_room":"`+roomID+`","alias":"#none:localhost"}`))
	}
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodDelete, http.MethodOptions, http.MethodHead, http.MethodPatch} {
		for _, path := range []string{send + "/m.room.message/1", send + "/m.room.message", state + "/m.room.name/", state + "/m.room.name", state + "/m.call.member/bob"} {
			do("alice", method, path, nil)
		}
	}
	// These paths belong to no component, or have one of the served prefixes.
	for _, path := range []string{
		"/", "/none", "//", "/_matrix/none", "/_matrix/client/none", "/_matrix/client//versions", "/_matrix/static/",
		"/_matrix/static/client/login/", "/_matrix/static/none", "/_matrix/media/v3/download/none/none", "/_matrix/key/v2/server",
		"/_matrix/federation/v1/version", "/.well-known/matrix/client", "/.well-known/matrix/server", "/_dendrite/monitor/up",
		"/_dendrite/monitor/health", "/_dendrite/none", "/_synapse/admin/v1/none", "/_synapse/none",
	} {
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodDelete} {
			do("nobody", method, path, nil)
		}
	}
	return answers
}
