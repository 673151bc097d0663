//go:build all

package install

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// These are the server name in the files, and the addresses for clients and for other servers.
const (
	serverName = "example.com"
	atName     = "https://" + serverName
	atMatrix   = "https://matrix." + serverName
	atPort8448 = "https://" + serverName + ":8448"
)

// soon is longer than any step of these tests takes.
var soon = patience.For(20 * time.Second)

func TestCaddy(t *testing.T) {
	testProxy(t, func(t *testing.T, hs *homeserver.Server, https, federation string) *x509.CertPool {
		caddy, dir := installed(t, "caddy"), t.TempDir()
		_, httpsPort, _ := net.SplitHostPort(https)
		_, httpPort, _ := net.SplitHostPort(freeAddress(t))
		_, federationPort, _ := net.SplitHostPort(federation)
		// Caddy uses an authority of its own for certificates, and keeps all its files in the folder.
		file := adapt(t, "install/Caddyfile", dir, "127.0.0.1:8008", address(t, hs.URL), ":8448", ":"+federationPort,
			"\n{\n", "\n{\n admin off\n local_certs\n skip_install_trust\n default_bind 127.0.0.1\n http_port "+httpPort+
				"\n https_port "+httpsPort+"\n storage file_system "+dir+"\n")
		out, err := exec.CommandContext(t.Context(), caddy, "validate", "--adapter", "caddyfile", "--config", file).CombinedOutput()
		require.NoError(t, err, "%s", out)
		run(t, dir, https, caddy, "run", "--adapter", "caddyfile", "--config", file)
		root, err := os.ReadFile(filepath.Join(dir, "pki/authorities/local/root.crt"))
		require.NoError(t, err)
		return trusting(t, root)
	})
}

func TestNginx(t *testing.T) {
	testProxy(t, func(t *testing.T, hs *homeserver.Server, https, federation string) *x509.CertPool {
		dir := t.TempDir()
		authority := writeCertificate(t, dir)
		site := adapt(t, "install/nginx.conf", dir, "127.0.0.1:8008", address(t, hs.URL),
			"	listen [::]:443 ssl http2;\n", "", "	listen [::]:8448 ssl http2;\n", "",
			"listen 443 ", "listen "+https+" ", "listen 8448 ", "listen "+federation+" ",
			"/etc/letsencrypt/live/example.com/", dir+"/", "/var/log/nginx/", dir+"/")
		runNginx(t, dir, https, site)
		t.Cleanup(func() {
			if t.Failed() {
				return
			}
			log, err := os.ReadFile(filepath.Join(dir, "matrix.log"))
			require.NoError(t, err)
			require.Contains(t, string(log), "/delayed_events/...")
			require.NotContains(t, string(log), delayID)
			require.NotContains(t, string(log), "secret-in-query")
		})
		return trusting(t, authority)
	})
}

// runNginx checks the file of a site, and runs nginx with it until the test ends.
func runNginx(t *testing.T, dir, https, site string) {
	t.Helper()
	nginx, args := testNginx(t, dir, site)
	run(t, dir, https, nginx, args...)
}

// testNginx has nginx check the file of a site. It returns the command that runs nginx with it.
func testNginx(t *testing.T, dir, site string) (nginx string, args []string) {
	t.Helper()
	nginx = installed(t, "nginx")
	main := "daemon off;\nuser root;\npid pid;\nerror_log error.log;\nevents {}\nhttp {\n access_log off;\n"
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		main += fmt.Sprintf(" %s_temp_path %s;\n", kind, kind)
	}
	file := filepath.Join(dir, "main.conf")
	require.NoError(t, os.WriteFile(file, []byte(main+" include "+site+";\n}\n"), 0o600))
	args = []string{"-p", dir, "-e", "error.log", "-c", file}
	out, err := exec.CommandContext(t.Context(), nginx, append(args, "-t")...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return nginx, args
}

// delayID is the ID of no delayed event.
const delayID = "a-delay-id"

// testProxy checks that a proxy forwards the requests that it should, and no others.
func testProxy(t *testing.T, proxy func(t *testing.T, hs *homeserver.Server, https, federation string) *x509.CertPool) {
	hs := start(t)
	https, federation := freeAddress(t), freeAddress(t)
	authorities := proxy(t, hs, https, federation)
	// from is a client with a given loopback address. It finds the proxy without DNS.
	from := func(source, serverURL string) *homeserver.Client {
		transport := &http.Transport{
			ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: authorities},
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
				if strings.HasSuffix(addr, ":8448") {
					return dialer.DialContext(ctx, network, federation)
				}
				return dialer.DialContext(ctx, network, https)
			},
		}
		t.Cleanup(transport.CloseIdleConnections)
		return &homeserver.Client{URL: serverURL, HTTP: &http.Client{Transport: transport, Timeout: soon}}
	}
	anybody := func(serverURL string) *homeserver.Client { return from("127.0.0.1", serverURL) }
	do := func(c *homeserver.Client, code int, method, path string, body any, header ...string) homeserver.Response {
		t.Helper()
		res, err := c.Do(t.Context(), method, path, body, header...)
		require.NoError(t, err)
		require.Equal(t, code, res.Code, "%s %s: %.500s", method, path, res)
		return res
	}

	// Clients and servers find the homeserver from the server name.
	res := do(anybody(atName), http.StatusOK, http.MethodGet, "/.well-known/matrix/client", nil)
	require.Equal(t, atMatrix, res.Get(`m\.homeserver.base_url`).Str)
	require.Equal(t, []string{"*"}, res.Header["Access-Control-Allow-Origin"])
	res = do(anybody(atName), http.StatusOK, http.MethodGet, "/.well-known/matrix/server", nil)
	require.Equal(t, "matrix.example.com:443", res.Get(`m\.server`).Str)

	// Other servers reach the federation API.
	for _, at := range []string{atMatrix, atPort8448} {
		res = do(anybody(at), http.StatusOK, http.MethodGet, "/_matrix/key/v2/server", nil)
		require.Equal(t, serverName, res.Get("server_name").Str)
		do(anybody(at), http.StatusOK, http.MethodGet, "/_matrix/federation/v1/version", nil)
	}

	// These paths are not public.
	for _, path := range []string{"/metrics", "/_synapse/admin/v1/register", "/_dendrite/monitor/up", "/"} {
		for _, at := range []string{atName, atMatrix, atPort8448} {
			do(anybody(at), http.StatusNotFound, http.MethodGet, path, nil)
		}
	}

	// A client uses the server as a person does.
	_, err := homeserver.RegisterAt(t.Context(), hs.URL, secret, "alice")
	require.NoError(t, err)
	alice := anybody(atMatrix)
	res = do(alice, http.StatusOK, http.MethodPost, "/_matrix/client/v3/login", homeserver.JSON{
		"type": "m.login.password", "identifier": homeserver.JSON{"type": "m.id.user", "user": "alice"}, "password": homeserver.Password,
	})
	alice.UserID, alice.Token = res.Get("user_id").Str, res.Get("access_token").Str
	require.Equal(t, "@alice:"+serverName, alice.UserID)
	roomID, err := alice.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	since := do(alice, http.StatusOK, http.MethodGet, "/_matrix/client/v3/sync", nil).Get("next_batch").Str

	// The proxy does not change a path.
	for _, key := range []string{"a/b", "a//b", "100%", "a%2Fb", "ü?#"} {
		path := homeserver.StatePath(roomID, "org.example", key)
		do(alice, http.StatusOK, http.MethodPut, path, homeserver.JSON{"key": key})
		require.Equal(t, key, do(alice, http.StatusOK, http.MethodGet, path, nil).Get("key").Str)
	}

	// A sync waits, and is answered when an event arrives.
	for came := false; !came; {
		var answered homeserver.Response
		var waiting sync.WaitGroup
		waiting.Go(func() {
			answered = do(alice, http.StatusOK, http.MethodGet, "/_matrix/client/v3/sync?timeout=15000&since="+url.QueryEscape(since), nil)
		})
		do(alice, http.StatusOK, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), homeserver.JSON{"msgtype": "m.text", "body": "hello"})
		waiting.Wait()
		since = answered.Get("next_batch").Str
		came = strings.Contains(string(answered.Body), `"hello"`)
	}

	// The largest upload succeeds, and a larger one is refused.
	largest := make([]byte, 50<<20)
	do(alice, http.StatusOK, http.MethodPost, "/_matrix/media/v3/upload", largest, "Content-Type", "application/octet-stream")
	do(alice, http.StatusRequestEntityTooLarge, http.MethodPost, "/_matrix/media/v3/upload", append(largest, 0), "Content-Type", "application/octet-stream")

	// These requests need no account: a browser's preflight request, a keep-alive, and a request about a delayed event.
	token := do(alice, http.StatusOK, http.MethodPut, homeserver.StatePath(roomID, "m.call.member", alice.UserID),
		homeserver.JSON{"m.will_expire": 60}).Get("expire_refresh_token").Str
	res = do(anybody(atMatrix), http.StatusOK, http.MethodOptions, "/_matrix/client/v3/expiration/refresh", nil)
	require.Equal(t, []string{"*"}, res.Header["Access-Control-Allow-Origin"])
	res, err = anybody(atMatrix).KeepAlive(t.Context(), "refresh", token)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, res.Code, res)
	do(anybody(atMatrix), http.StatusNotFound, http.MethodPost,
		"/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"+delayID+"/restart?access_token=secret-in-query", nil)

	// Requests are limited by the client's real address, and not by the proxy's address or by a header that the client sends. That is also
	// true for Dendrite's own limits, which use the header as a whole.
	const requests = 100
	for _, path := range []string{"/_matrix/client/v3/expiration/refresh", "/_matrix/client/v3/register/available?username=bob"} {
		ask := func(c *homeserver.Client, claimed string) (limited bool) {
			method, body := http.MethodGet, any(nil)
			if strings.Contains(path, "expiration") {
				method, body = http.MethodPut, homeserver.JSON{"expire_refresh_token": strings.Repeat("x", 43)}
			}
			res, err := c.Do(context.Background(), method, path, body, "X-Forwarded-For", claimed)
			require.NoError(t, err)
			return res.Code == http.StatusTooManyRequests
		}
		one := from("127.0.1.0", atMatrix)
		require.NotZero(t, together(requests, func(i int) bool { return ask(one, fmt.Sprintf("192.0.2.%d", i)) }), path)
		require.Zero(t, together(requests, func(i int) bool { return ask(from(fmt.Sprintf("127.0.2.%d", i), atMatrix), "192.0.2.1") }), path)
	}
}

// together calls a function n times at once, and counts how often it returned true.
func together(n int, do func(i int) bool) int {
	var (
		all   sync.WaitGroup
		count atomic.Int64
	)
	for i := range n {
		all.Go(func() {
			if do(i) {
				count.Add(1)
			}
		})
	}
	all.Wait()
	return int(count.Load())
}

// run runs a program until the test ends. It returns when the program serves TLS.
func run(t *testing.T, dir, https, program string, args ...string) {
	t.Helper()
	output, err := os.Create(filepath.Join(dir, "output"))
	require.NoError(t, err)
	defer output.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.Env = append(os.Environ(), "HOME="+dir)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			said, _ := os.ReadFile(output.Name())
			t.Logf("%s", said[max(0, len(said)-4000):])
		}
	})
	for deadline := time.Now().Add(soon); ; time.Sleep(20 * time.Millisecond) {
		conn, err := tls.Dial("tcp", https, &tls.Config{ServerName: "matrix." + serverName, InsecureSkipVerify: true})
		if err == nil {
			_ = conn.Close()
			return
		}
		require.True(t, time.Now().Before(deadline), "%s does not come up: %s", program, err)
	}
}

// freeAddress returns a loopback address with a port that is free at the moment.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// writeCertificate writes, in the layout of certbot, the certificate that Go's tests have for example.com and its subdomains. It returns
// the certificate, because it is self-signed.
func writeCertificate(t *testing.T, dir string) []byte {
	t.Helper()
	s := httptest.NewUnstartedServer(nil)
	s.StartTLS()
	defer s.Close()
	certificate := s.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	require.NoError(t, err)
	signed := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]})
	require.NoError(t, os.WriteFile(filepath.Join(dir, "fullchain.pem"), signed, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "privkey.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600))
	return signed
}

func trusting(t *testing.T, authority []byte) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(authority))
	return pool
}
