//go:build all

package install

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Caddy with the lines that the pages append forwards what clients need of LiveKit and lk-jwt-service, and nothing else, and serves the pages
// of Element Call.
func TestCaddyForCalls(t *testing.T) {
	testCalls(t, func(t *testing.T, root, https string, backends []string) *x509.CertPool {
		caddy, dir, file := installed(t, "caddy"), t.TempDir(), filepath.Join(root, "etc/caddy/Caddyfile")
		_, httpsPort, _ := net.SplitHostPort(https)
		_, httpPort, _ := net.SplitHostPort(freeAddress(t))
		replace(t, file, append(backends, ", example.com:8448", "", "/var/www/", root+"/var/www/",
			"\n{\n", "\n{\n admin off\n local_certs\n skip_install_trust\n default_bind 127.0.0.1\n http_port "+httpPort+
				"\n https_port "+httpsPort+"\n storage file_system "+dir+"\n")...)
		validate(t, file)
		run(t, dir, https, caddy, "run", "--adapter", "caddyfile", "--config", file)
		return trusting(t, []byte(read(t, filepath.Join(dir, "pki/authorities/local/root.crt"))))
	})
}

// The same for nginx, with the site of install.md beside it.
func TestNginxForCalls(t *testing.T) {
	testCalls(t, func(t *testing.T, root, https string, backends []string) *x509.CertPool {
		dir, sites := t.TempDir(), filepath.Join(root, "etc/nginx/sites-available")
		authority := writeCertificate(t, dir)
		for site, oldNew := range map[string][]string{
			"matrix": {"	listen 8448 ssl http2;\n", "", "	listen [::]:8448 ssl http2;\n", "",
				"/etc/letsencrypt/live/example.com/", dir + "/", "/var/log/nginx/", dir + "/"},
			"calls":        append(backends, "/etc/letsencrypt/live/rtc.example.com/", dir+"/"),
			"element-call": {"/etc/letsencrypt/live/call.example.com/", dir + "/", "/var/www/", root + "/var/www/"},
		} {
			replace(t, filepath.Join(sites, site), append(oldNew,
				"	listen [::]:443 ssl http2;\n", "", "listen 443 ", "listen "+https+" ")...)
		}
		runNginx(t, dir, https, sites+"/*")
		return trusting(t, authority)
	})
}

// testCalls runs the commands of the pages about calls, and checks a proxy with the files that they leave. The proxy gets backends: pairs of
// the address in its file and the address to use.
func testCalls(t *testing.T, proxy func(t *testing.T, root, https string, backends []string) *x509.CertPool) {
	root := after(t, serverName, "element-call/matrix_rtc.yaml", elementCall, lkJWTService)
	require.NoError(t, os.Chmod(root, 0o755)) // nginx may run as somebody else
	type request struct {
		to  string
		uri string
		http.Header
	}
	asked := make(chan request, 1)
	var backends []string
	for _, to := range []string{"127.0.0.1:7880", "127.0.0.1:8080"} {
		backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			asked <- request{to, r.RequestURI, r.Header}
		}))
		defer backend.Close()
		backends = append(backends, to, address(t, backend.URL))
	}
	https := freeAddress(t)
	client := &http.Client{Timeout: soon, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: proxy(t, root, https, backends)},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, https)
		},
	}}
	defer client.CloseIdleConnections()
	get := func(url string) (status int, body string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		require.NoError(t, err)
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Upgrade", "websocket")
		res, err := client.Do(req)
		require.NoError(t, err)
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		return res.StatusCode, string(text)
	}

	for path, want := range map[string]request{
		"/livekit/sfu/rtc?access_token=x":  {to: "127.0.0.1:7880", uri: "/rtc?access_token=x"},
		"/livekit/sfu/rtc/v1?join_request": {to: "127.0.0.1:7880", uri: "/rtc/v1?join_request"},
		"/livekit/sfu/rtc/validate":        {to: "127.0.0.1:7880", uri: "/rtc/validate"},
		"/livekit/jwt/sfu/get":             {to: "127.0.0.1:8080", uri: "/sfu/get"},
	} {
		status, _ := get("https://rtc.example.com" + path)
		require.Equal(t, http.StatusOK, status, path)
		got := <-asked
		require.Equal(t, want, request{to: got.to, uri: got.uri})
		if got.to == "127.0.0.1:7880" {
			require.Equal(t, []string{"websocket", "upgrade"}, []string{got.Get("Upgrade"), strings.ToLower(got.Get("Connection"))})
		}
	}

	// The API, the other protocols and the health of LiveKit are not public, and the name of LiveKit has nothing else.
	for _, path := range []string{
		"/", "/metrics", "/_matrix/client/versions", "/livekit/sfu", "/livekit/sfu/", "/livekit/sfu/twirp/livekit.RoomService/ListRooms",
		"/livekit/sfu/agent", "/livekit/sfu/whip/v1", "/livekit/sfu/debug/rooms",
		"/livekit/sfu/rtc/../twirp/livekit.RoomService/ListRooms", "/livekit/sfu/rtc/%2e%2e/agent", "/livekit/sfu/rtc/..%2fagent",
	} {
		status, _ := get("https://rtc.example.com" + path)
		require.Equal(t, http.StatusNotFound, status, path)
		require.Empty(t, asked, path)
	}

	for _, path := range []string{"", "room/#/a-call"} {
		status, body := get("https://call.example.com/" + path)
		require.Equal(t, http.StatusOK, status)
		require.Contains(t, body, `<base href="/">`)
	}
	_, body := get("https://call.example.com/config.json")
	require.JSONEq(t, read(t, docs+"element-call/config.json"), body)
}

// validate has Caddy check a file.
func validate(t *testing.T, file string) {
	t.Helper()
	caddy := exec.CommandContext(t.Context(), installed(t, "caddy"), "validate", "--adapter", "caddyfile", "--config", file)
	caddy.Env = append(os.Environ(), "HOME="+t.TempDir())
	out, err := caddy.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// The commands of docs/install.md for a server whose name leads to another machine leave valid files in which only matrix.example.com is
// served.
func TestNameElsewhere(t *testing.T) {
	doc, err := os.ReadFile(docs + "install.md")
	require.NoError(t, err)
	commands := regexp.MustCompile(`(?m)^sed -i -e .*$`).FindAllString(string(doc), -1)
	require.Len(t, commands, 2)
	dir := t.TempDir()
	certificates := filepath.Join(dir, "live", "matrix."+serverName)
	require.NoError(t, os.MkdirAll(certificates, 0o700))
	writeCertificate(t, certificates)
	caddy := adapt(t, "install/Caddyfile", dir)
	nginx := adapt(t, "install/nginx.conf", dir, "/etc/letsencrypt/", dir+"/", "/var/log/nginx/", dir+"/",
		"	listen [::]:443 ssl http2;\n", "", "listen 443 ", "listen "+freeAddress(t)+" ")
	for i, file := range []string{caddy, nginx} {
		bash := exec.CommandContext(t.Context(), "bash", "-eu", "-c", regexp.MustCompile(`/etc/\S+$`).ReplaceAllString(commands[i], file))
		bash.Env = append(os.Environ(), "NAME="+serverName)
		out, err := bash.CombinedOutput()
		require.NoError(t, err, "%s", out)
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		served := regexp.MustCompile(`(?m)^(?:\S*example\.com.*\{|\s*server_name .*;)$`).FindAllString(string(text), -1)
		require.Len(t, served, 1, "%s", text)
		require.Contains(t, served[0], "matrix."+serverName)
		require.NotContains(t, served[0], ", ")
		require.NotRegexp(t, `(?m)^\s*listen.*8448`, string(text))
	}
	validate(t, caddy)
	testNginx(t, dir, nginx)
}
