package integration

import (
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	transportsPath       = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
	stableTransportsPath = "/_matrix/client/v1/rtc/transports"
	wellKnownPath        = "/.well-known/matrix/client"
)

// tokenPaths are the paths of a server that makes LiveKit's tokens itself.
var tokenPaths = []string{
	"/_matrix/client/v1/rtc/livekit/get_token",
	"/_matrix/client/v1/rtc/livekit/delegate_delayed_leave",
	"/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token",
	"/_matrix/client/unstable/io.element.msc4195/rtc/livekit/delegate_delayed_leave",
	"/_matrix/client/unstable/io.element.msc4195/livekit/sfu/get",
	"/_matrix/client/unstable/io.element.msc4195/livekit/get_token",
	"/_matrix/client/unstable/io.element.msc4195/livekit/delegate_delayed_leave",
	"/_matrix/client/unstable/io.element.msc4195/livekit/sfu_webhook",
	"/_matrix/client/unstable/io.element.msc4195/livekit/healthz",
	"/_matrix/client/v3/expiration/delegate",
	"/_matrix/federation/v1/rtc/livekit/get_token",
	"/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token",
}

// requireUnrecognized requires that a server answers as if it had never heard of these paths, in a way that browsers can read.
func requireUnrecognized(t *testing.T, who *user, paths ...string) {
	t.Helper()
	for _, path := range paths {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodOptions} {
			res := who.do(t, method, path, nil)
			require.Equal(t, http.StatusNotFound, res.Code, "%s %s: %s", method, path, res)
			require.Equal(t, "M_UNRECOGNIZED", res.Get("errcode").Str, "%s %s: %s", method, path, res)
			require.Equal(t, "*", res.Header.Get("Access-Control-Allow-Origin"), "%s %s", method, path)
		}
		// Without an answer of 200 to this a browser would not let the page see the 404.
		res, err := who.Do(t.Context(), http.MethodOptions, path, nil, "Access-Control-Request-Method", http.MethodPost)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, res.Code, path)
		require.Contains(t, res.Header.Get("Access-Control-Allow-Headers"), "Authorization")
	}
}

// Clients learn the transports of calls (MSC4143) from endpoints, if they are logged in, and from the well-known file. The operator's list is
// told as it is. Another server makes the tokens, so this one has no routes for them.
func TestTransports(t *testing.T) {
	t.Parallel()
	const stable = `[{"type":"livekit","livekit_service_url":"https://a.example/jwt"},{"type":"m.livekit","livekit_service_url":"https://a.example/jwt"},` +
		`{"type":"livekit","livekit_service_url":"http://b.example:8080"},{"type":"m.livekit","livekit_service_url":"http://b.example:8080"}]`
	const both = `[{"type":"livekit","livekit_service_url":"https://a.example/jwt"},{"type":"livekit","livekit_service_url":"http://b.example:8080"}]`
	s := start(t, homeserver.Config{WellKnown: true, MatrixRTC: JSON{"transports": []JSON{
		{"type": "livekit", "livekit_service_url": "https://a.example/jwt"},
		{"type": "livekit", "livekit_service_url": "http://b.example:8080"},
	}}})
	guest, err := s.RegisterGuest(t.Context())
	require.NoError(t, err)
	for _, u := range []*user{s.newUser(t), {guest, s}} {
		require.JSONEq(t, `{"rtc_transports":`+both+`}`, string(u.must(t, http.MethodGet, transportsPath, nil).Body))
		require.JSONEq(t, `{"rtc_transports":`+stable+`,"transports":`+stable+`}`, string(u.must(t, http.MethodGet, stableTransportsPath, nil).Body))
		require.True(t, u.must(t, http.MethodGet, "/_matrix/client/versions", nil).Get(`unstable_features.org\.matrix\.msc4143`).Bool())
	}
	anybody := &user{s.Anonymous(), s}
	for _, path := range []string{transportsPath, stableTransportsPath} {
		require.Equal(t, http.StatusUnauthorized, anybody.do(t, http.MethodGet, path, nil).Code)
		preflight, err := anybody.Do(t.Context(), http.MethodOptions, path, nil, "Access-Control-Request-Method", http.MethodGet)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, preflight.Code)
	}
	requireUnrecognized(t, anybody, tokenPaths...)
	res := anybody.must(t, http.MethodGet, wellKnownPath, nil)
	require.JSONEq(t, both, res.Get(`org\.matrix\.msc4143\.rtc_foci`).Raw)
	require.Equal(t, s.URL, res.Get(`m\.homeserver.base_url`).Str, "what Dendrite says")
	require.Equal(t, "*", res.Header.Get("Access-Control-Allow-Origin"))
}

// From the section livekit the transport is derived: the service is below this server's own URL. The url of the SFU is not announced,
// because there are no sticky events. The secret is not in the log.
func TestTransportOfLiveKit(t *testing.T) {
	t.Parallel()
	const secret = "only-for-tests-only-for-tests-only-for-tests"
	s := start(t, homeserver.Config{WellKnown: true, MatrixRTC: JSON{"livekit": JSON{
		"url": "ws://127.0.0.1:1/sfu", "api_key": "key", "api_secret": secret,
	}}})
	alice := s.newUser(t)
	derived := `{"type":"livekit","livekit_service_url":"` + s.URL + `/_matrix/client/unstable/io.element.msc4195/livekit"}`
	require.JSONEq(t, `{"rtc_transports":[`+derived+`]}`, string(alice.must(t, http.MethodGet, transportsPath, nil).Body))
	both := alice.must(t, http.MethodGet, stableTransportsPath, nil)
	require.JSONEq(t, "["+derived+","+strings.Replace(derived, "livekit", "m.livekit", 1)+"]", both.Get("transports").Raw)
	require.JSONEq(t, "["+derived+"]", alice.must(t, http.MethodGet, wellKnownPath, nil).Get(`org\.matrix\.msc4143\.rtc_foci`).Raw)
	require.True(t, alice.must(t, http.MethodGet, "/_matrix/client/versions", nil).Get(`unstable_features.org\.matrix\.msc4143`).Bool())
	eventually(t, "the health check names it", func() bool { return degraded(t, s) == `["calls: LiveKit cannot be reached"]` })
	s.Kill()
	for _, name := range []string{"output", "log"} {
		require.NotContains(t, everythingIn(t, filepath.Join(s.Dir, name)), secret)
	}
	require.Equal(t, 1, strings.Count(everythingIn(t, filepath.Join(s.Dir, "log")), "LiveKit cannot be reached at http://127.0.0.1:1/sfu "))
}

// degraded returns the list of the health check of a server that is healthy.
func degraded(t *testing.T, s *server) string {
	t.Helper()
	res, err := s.Anonymous().Do(t.Context(), http.MethodGet, "/_dendrite/monitor/health", nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, res.Code, res)
	require.False(t, res.Get("warnings").Exists(), res)
	return res.Get("degraded").Raw
}

// A LiveKit that refuses the key, whose clock is wrong, or that clients could not reach is in the health check, and the server runs all the
// same. One that works is not.
func TestHealthOfLiveKit(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		url   string
		code  int
		clock time.Duration
		want  string
	}{
		"Fine":    {"wss://rtc.example.com", http.StatusOK, 0, ""},
		"Refused": {"wss://rtc.example.com", http.StatusUnauthorized, 0, `["calls: LiveKit refuses the key or the secret"]`},
		"Clock":   {"wss://rtc.example.com", http.StatusOK, -time.Minute, `["calls: LiveKit's clock is not the same as this server's"]`},
		"NoTLS":   {"ws://rtc.example.com", http.StatusOK, 0, `["calls: clients cannot reach ws://rtc.example.com from a secure page"]`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan string, 1)
			liveKit := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				w.Header().Set("Date", time.Now().Add(test.clock).UTC().Format(http.TimeFormat))
				w.WriteHeader(test.code)
				_, _ = w.Write([]byte(`{"rooms":[]}`))
				select {
				case asked <- req.URL.Path:
				default:
				}
			}))
			defer liveKit.Close()
			s := start(t, homeserver.Config{WellKnown: true, MatrixRTC: JSON{"livekit": JSON{
				"url": test.url, "api_url": liveKit.URL, "api_key": "key", "api_secret": "only-for-tests-only-for-tests-only-for-tests",
			}}})
			require.Equal(t, "/twirp/livekit.RoomService/ListRooms", <-asked)
			eventually(t, "the health check names it", func() bool { return degraded(t, s) == test.want })
		})
	}
}

// A server without the section matrix_rtc has no route of calls at all. The well-known file has no such field, and /versions no such feature.
func TestNothingConfiguredForCalls(t *testing.T) {
	t.Parallel()
	authority, err := homeserver.NewAuthority(t.TempDir())
	require.NoError(t, err)
	s := start(t, homeserver.Config{WellKnown: true, Federation: &homeserver.Federation{Host: "127.0.0.4", Authority: authority}})
	alice := s.newUser(t)
	for _, who := range []*user{alice, {s.Anonymous(), s}} {
		requireUnrecognized(t, who, append(tokenPaths, transportsPath, stableTransportsPath)...)
	}
	require.False(t, alice.must(t, http.MethodGet, wellKnownPath, nil).Get(`org\.matrix\.msc4143\.rtc_foci`).Exists())
	require.False(t, alice.must(t, http.MethodGet, "/_matrix/client/versions", nil).Get(`unstable_features.org\.matrix\.msc4143`).Exists())
}

// A client that asks for the transports in a loop is told to wait. Others are not.
func TestTransportsAreLimited(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{
		MatrixRTC:  JSON{"transports": []JSON{{"type": "livekit", "livekit_service_url": "https://a.example"}}},
		Expiration: JSON{"rate_limiting": JSON{"user": JSON{"threshold": 3, "cooloff_ms": 3_600_000}}},
	})
	alice, bob := s.newUser(t), s.newUser(t)
	for i, path := range []string{transportsPath, stableTransportsPath, transportsPath, stableTransportsPath} {
		res := alice.do(t, http.MethodGet, path, nil)
		if i < 3 {
			require.Equal(t, http.StatusOK, res.Code, res)
			continue
		}
		require.Equal(t, http.StatusTooManyRequests, res.Code, res)
		require.Equal(t, "M_LIMIT_EXCEEDED", res.Get("errcode").Str)
		require.NotEmpty(t, res.Header.Get("Retry-After"))
	}
	bob.must(t, http.MethodGet, transportsPath, nil)
}

// A server that does not publish its URL does not publish transports in the well-known file either.
func TestTransportsWithoutWellKnown(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{MatrixRTC: JSON{"transports": []JSON{{"type": "livekit", "livekit_service_url": "https://a.example"}}}})
	res := (&user{s.Anonymous(), s}).do(t, http.MethodGet, wellKnownPath, nil)
	require.Equal(t, http.StatusNotFound, res.Code)
	require.Equal(t, "M_UNRECOGNIZED", res.Get("errcode").Str)
}

// everythingIn returns the content of a file, or of all files in a folder.
func everythingIn(t *testing.T, path string) string {
	t.Helper()
	var all strings.Builder
	require.NoError(t, filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(name)
		all.Write(data)
		return err
	}))
	require.NotEmpty(t, all.String(), path)
	return all.String()
}

func TestBadTransports(t *testing.T) {
	t.Parallel()
	for section, says := range map[string]string{
		"5":                  `"matrix_rtc": 5 (must be a section`,
		"{transport: []}":    `unknown config key "transport" (the keys there are livekit, transports)`,
		"{transports: {}}":   `transports": a section (must be a list of sections)`,
		"{transports: [5]}":  `"transports": 5 (must be a section`,
		"{transports: [{}]}": `"matrix_rtc.transports[0].type"`,
		"{transports: [{type: livekit, url: x}]}":                                                                                                   `unknown config key "url" (the keys there are type, livekit_service_url)`,
		"{transports: [{type: livekit, livekit_service_url: [x]}]}":                                                                                 `livekit_service_url": a list (must be text)`,
		"{transports: [{type: jitsi, livekit_service_url: 'https://a.example'}]}":                                                                   `"matrix_rtc.transports[0].type": "jitsi" (must be livekit)`,
		"{transports: [{type: livekit, livekit_service_url: 'https://a.example'}, {type: livekit}]}":                                                `"matrix_rtc.transports[1].livekit_service_url": ""`,
		"{transports: [{type: livekit, livekit_service_url: a.example/jwt}]}":                                                                       `"matrix_rtc.transports[0].livekit_service_url": "a.example/jwt"`,
		"{transports: [{type: livekit, livekit_service_url: 'wss://a.example'}]}":                                                                   `"matrix_rtc.transports[0].livekit_service_url": "wss://a.example"`,
		"{transports: [{type: livekit, livekit_service_url: 'https:///jwt'}]}":                                                                      `"matrix_rtc.transports[0].livekit_service_url": "https:///jwt"`,
		"{transports: [{type: livekit, livekit_service_url: 'https://user:secret@a.example'}]}":                                                     `"matrix_rtc.transports[0].livekit_service_url"`,
		"{transports: [{type: livekit, livekit_service_url: 'https://a.example?x'}]}":                                                               `"matrix_rtc.transports[0].livekit_service_url": "https://a.example?x"`,
		"{transports: [{type: livekit, livekit_service_url: 'https://a.example/#x'}]}":                                                              `"matrix_rtc.transports[0].livekit_service_url": "https://a.example/#x"`,
		"{transports: [{type: livekit, livekit_service_url: 'https://a.example:port'}]}":                                                            `"matrix_rtc.transports[0].livekit_service_url": "https://a.example:port"`,
		"{livekit: {url: 'wss://a.example', api_key: key, api_secret: change-me-change-me-change-me-change-me}}":                                    `"matrix_rtc.livekit.api_secret": the value is still the placeholder`,
		"{livekit: {url: 'wss://a.example', api_key: key, api_secret_file: /none}}":                                                                 `"matrix_rtc.livekit.api_secret_file": open /none: no such file`,
		"{livekit: {url: 'wss://a.example', api_key: key, api_secret: only-for-tests-only-for-tests-only}}":                                         `missing config key "matrix_rtc.livekit.service_url"`,
		"{livekit: {url: 'wss://a.example', api_key: key, api_secret: x}, transports: [{type: livekit, livekit_service_url: 'https://a.example'}]}": `only one of them`,
	} {
		t.Run(section, func(t *testing.T) {
			hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
			require.NoError(t, err)
			name := filepath.Join(hs.Dir, "dendrite.yaml")
			config, err := os.ReadFile(name)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(name, append(config, []byte("\nmatrix_rtc: "+section+"\n")...), 0o600))
			requireFails(t, says, "--config", name, "--really-enable-open-registration", "--http-bind-address", "127.0.0.1:0")
		})
	}
}
