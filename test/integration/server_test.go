package integration

import (
	"bytes"
	"context"
	"encoding/hex"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

// startWithFailpoints is start with a server that obeys Server.Failpoints.
func startWithFailpoints(t *testing.T, cfg homeserver.Config) *server {
	t.Helper()
	binary, err := withFailpoints()
	require.NoError(t, err)
	return startBinary(t, binary, cfg)
}

// server is a running homeserver, with assertions.
type server struct {
	*homeserver.Server
	cfg    homeserver.Config
	mu     sync.Mutex
	tokens []string // all issued tokens
	// delayIDs are secrets like tokens, except that their owners can read them again.
	delayIDs []string
	users    int
	panics   bool // the test causes panics in requests
}

// start starts a homeserver for one test. When the test ends, the server is stopped. Then everything that it wrote is searched for the
// tokens that it issued.
func start(t *testing.T, cfg homeserver.Config) *server {
	t.Helper()
	return startBinary(t, binary, cfg)
}

func startBinary(t *testing.T, binary string, cfg homeserver.Config) *server {
	t.Helper()
	hs, err := homeserver.New(binary, t.TempDir(), cfg)
	require.NoError(t, err)
	s := &server{Server: hs, cfg: cfg}
	require.NoError(t, s.Start(t.Context()))
	t.Cleanup(func() {
		s.tokens = append(s.tokens, s.delayIDs...)
		metrics, err := s.Anonymous().Do(context.Background(), http.MethodGet, "/metrics", nil)
		if err == nil {
			s.searchForTokens(t, "the metrics", metrics.Body)
		}
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		written, err := s.Written()
		if err != nil {
			t.Error(err)
		}
		if dir := os.Getenv("KEEP_LOGS"); t.Failed() && dir != "" {
			_ = os.WriteFile(dir+"/log", written, 0o600)
			_ = os.WriteFile(dir+"/metrics", metrics.Body, 0o600)
		}
		for name, data := range s.data(t, cfg.Postgres) {
			s.searchForTokens(t, name, data)
		}
		if i := bytes.Index(written, []byte("DATA RACE")); i >= 0 {
			t.Errorf("the server has a data race:\n%.4000s", written[i:])
		}
		if i := bytes.Index(written, []byte("Request panicked")); i >= 0 && !s.panics {
			t.Errorf("a request panicked:\n%.2000s", written[i:])
		}
	})
	return s
}

// tokenLength is the length of a token, and beginning the number of characters that are compared first.
const (
	tokenLength = 43
	beginning   = 8
)

// searchForTokens searches for all tokens in one pass, because there can be many tokens and much text.
func (s *server) searchForTokens(t *testing.T, where string, written []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	tokens := map[[beginning]byte][]string{} // by their first characters, which mostly suffice to see that there is no token
	for _, token := range s.tokens {
		for _, text := range []string{token, hex.EncodeToString([]byte(token))} { // PostgreSQL dumps bytes in hexadecimal
			key := [beginning]byte([]byte(text))
			tokens[key] = append(tokens[key], text)
		}
	}
	for run := range bytes.FieldsFuncSeq(written, notInTokens) {
		for i := range len(run) - tokenLength + 1 {
			for _, text := range tokens[[beginning]byte(run[i:])] {
				if bytes.HasPrefix(run[i:], []byte(text)) {
					t.Errorf("a token stands in %s", where)
					return
				}
			}
		}
	}
}

// notInTokens reports whether a character never occurs in a token.
func notInTokens(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-'
}

// data returns all data of the server: its files by name, and a dump of its PostgreSQL database, if it has one.
func (s *server) data(t *testing.T, dsn string) map[string][]byte {
	all := map[string][]byte{}
	err := filepath.WalkDir(s.Dir, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			all[path], err = os.ReadFile(path)
		}
		if os.IsNotExist(err) { // files may vanish while the server runs
			err = nil
		}
		return err
	})
	if err == nil && dsn != "" {
		all["PostgreSQL"], err = postgres.Dump(context.Background(), dsn)
	}
	if err != nil {
		t.Error(err)
	}
	return all
}

// bridge returns the registration file of an application service. Its token is as-token, and its users are those whose names begin with
// bridge.
func bridge(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "bridge.yaml")
	require.NoError(t, os.WriteFile(file, []byte(`
id: bridge
url: null
as_token: as-token
hs_token: hs-token
sender_localpart: bridge
namespaces: {users: [{exclusive: true, regex: "@bridge.*"}]}
rate_limited: true
`), 0o600))
	return file
}

// restart stops or kills the server, and starts it again.
func (s *server) restart(t *testing.T, crash bool) {
	t.Helper()
	if crash {
		s.Kill()
	} else {
		require.NoError(t, s.Stop())
	}
	require.NoError(t, s.Start(t.Context()))
}

func (s *server) remember(res homeserver.Response) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if token := res.Get("expire_refresh_token").Str; token != "" {
		s.tokens = append(s.tokens, token)
	}
	if delayID := res.Get("delay_id").Str; delayID != "" {
		s.delayIDs = append(s.delayIDs, delayID)
	}
}

// isSend reports whether a request sends an event, so that its answer may contain a token.
func isSend(method, path string) bool {
	return (method == http.MethodPut || method == http.MethodPost) &&
		(strings.Contains(path, "/send/") || strings.Contains(path, "/state/") || strings.Contains(path, "/delayed_event/"))
}

// keepAlive calls the keep-alive endpoint and returns status and error code.
func (s *server) keepAlive(t *testing.T, method, token string) (int, string) {
	t.Helper()
	res, err := s.Anonymous().KeepAlive(t.Context(), method, token)
	require.NoError(t, err)
	s.searchForTokens(t, "the answer to a keep-alive", res.Body)
	return res.Code, res.Get("errcode").Str
}

func (s *server) refreshed(t *testing.T, token string) {
	t.Helper()
	code, errcode := s.keepAlive(t, "refresh", token)
	require.Equal(t, http.StatusOK, code, errcode)
}

// refused requires that the server refuses a token.
func (s *server) refused(t *testing.T, token string) {
	t.Helper()
	code, errcode := s.keepAlive(t, "refresh", token)
	require.Equal(t, http.StatusNotFound, code)
	require.Equal(t, "M_NOT_FOUND", errcode)
}
