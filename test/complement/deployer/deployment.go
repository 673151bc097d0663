package deployer

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/matrix-org/complement/client"
	"github.com/matrix-org/complement/config"
	"github.com/matrix-org/complement/ct"
	"github.com/matrix-org/complement/helpers"
	"github.com/matrix-org/gomatrixserverlib/spec"
)

const (
	defaultPassword  = "complement_meets_min_password_req"
	syncUntilTimeout = 5 * time.Second
)

// Deployment has the servers of one test. It is a complement.Deployment, which documents the methods.
type Deployment struct {
	config  *config.Complement
	dir     string
	servers map[string]*server
	users   atomic.Int64 // the number of registered users

	mu     sync.Mutex
	tokens map[string]string // access tokens by user ID
}

func (d *Deployment) server(t ct.TestLike, name string) *server {
	t.Helper()
	s := d.servers[name]
	if s == nil {
		ct.Fatalf(t, "there is no server %q in this deployment", name)
	}
	return s
}

// GetFullyQualifiedHomeserverName returns the name by which other servers find a server.
func (d *Deployment) GetFullyQualifiedHomeserverName(t ct.TestLike, hsName string) spec.ServerName {
	t.Helper()
	d.server(t, hsName)
	return spec.ServerName(hsName)
}

// UnauthenticatedClient returns a client without an access token.
func (d *Deployment) UnauthenticatedClient(t ct.TestLike, hsName string) *client.CSAPI {
	t.Helper()
	return client.NewCSAPI(client.CSAPIOpts{
		BaseURL:          d.server(t, hsName).clientURL(),
		Client:           client.NewLoggedClient(t, hsName, nil),
		SyncUntilTimeout: syncUntilTimeout,
		Debug:            d.config.DebugLoggingEnabled,
	})
}

// Register makes an account and logs it in.
func (d *Deployment) Register(t ct.TestLike, hsName string, opts helpers.RegistrationOpts) *client.CSAPI {
	t.Helper()
	localpart := fmt.Sprintf("user-%d", d.users.Add(1))
	if opts.LocalpartSuffix != "" {
		localpart += "-" + opts.LocalpartSuffix
	}
	return d.register(t, hsName, localpart, opts)
}

func (d *Deployment) register(t ct.TestLike, hsName, localpart string, opts helpers.RegistrationOpts) *client.CSAPI {
	t.Helper()
	c := d.UnauthenticatedClient(t, hsName)
	c.Password = opts.Password
	if c.Password == "" {
		c.Password = defaultPassword
	}
	if opts.IsAdmin {
		c.UserID, c.AccessToken, c.DeviceID = c.RegisterSharedSecret(t, localpart, c.Password, true)
	} else {
		c.UserID, c.AccessToken, c.DeviceID = c.RegisterUser(t, localpart, c.Password)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tokens[c.UserID] = c.AccessToken
	return c
}

// Login logs in to an existing account.
func (d *Deployment) Login(t ct.TestLike, hsName string, existing *client.CSAPI, opts helpers.LoginOpts) *client.CSAPI {
	t.Helper()
	c := d.UnauthenticatedClient(t, hsName)
	c.Password = opts.Password
	if c.Password == "" {
		c.Password = existing.Password
	}
	localpart, _, _ := strings.Cut(strings.TrimPrefix(existing.UserID, "@"), ":")
	var login []client.LoginOpt
	if opts.DeviceID != "" {
		login = append(login, client.WithDeviceID(opts.DeviceID))
	}
	c.UserID, c.AccessToken, c.DeviceID = c.LoginUser(t, localpart, c.Password, login...)
	return c
}

// AppServiceUser returns a client for the user of an application service.
func (d *Deployment) AppServiceUser(t ct.TestLike, hsName, appServiceUserID string) *client.CSAPI {
	t.Helper()
	c := d.UnauthenticatedClient(t, hsName)
	d.mu.Lock()
	defer d.mu.Unlock()
	c.UserID, c.AccessToken = appServiceUserID, d.tokens[appServiceUserID]
	if c.AccessToken == "" && appServiceUserID != "" {
		ct.Fatalf(t, "%s has no access token for %s", hsName, appServiceUserID)
	}
	return c
}

// Restart stops all servers and starts them again.
func (d *Deployment) Restart(t ct.TestLike) error {
	t.Helper()
	for name, s := range d.servers {
		if err := errors.Join(s.stop(), s.start()); err != nil {
			ct.Errorf(t, "restarting %s: %s", name, err)
			return err
		}
	}
	return nil
}

// StopServer stops a server.
func (d *Deployment) StopServer(t ct.TestLike, hsName string) {
	t.Helper()
	d.do(t, "stopping", hsName, (*server).stop)
}

// StartServer starts a server that was stopped.
func (d *Deployment) StartServer(t ct.TestLike, hsName string) {
	t.Helper()
	d.do(t, "starting", hsName, (*server).start)
}

// PauseServer suspends a server's process.
func (d *Deployment) PauseServer(t ct.TestLike, hsName string) {
	t.Helper()
	d.do(t, "pausing", hsName, (*server).pause)
}

// UnpauseServer resumes it.
func (d *Deployment) UnpauseServer(t ct.TestLike, hsName string) {
	t.Helper()
	d.do(t, "unpausing", hsName, (*server).unpause)
}

func (d *Deployment) do(t ct.TestLike, what, hsName string, f func(*server) error) {
	t.Helper()
	t.Logf("%s %s", what, hsName)
	if err := f(d.server(t, hsName)); err != nil {
		ct.Fatalf(t, "%s %s: %s", what, hsName, err)
	}
}

// ContainerID returns the path of the server's folder, which has its log and its databases.
func (d *Deployment) ContainerID(t ct.TestLike, hsName string) string {
	t.Helper()
	return d.server(t, hsName).dir
}

// Destroy ends the servers. It keeps their files if the test failed.
func (d *Deployment) Destroy(t ct.TestLike) {
	t.Helper()
	d.destroy()
	if t.Failed() {
		t.Logf("logs and databases of the servers are in %s", d.dir)
	} else if err := os.RemoveAll(d.dir); err != nil {
		t.Errorf("%s", err)
	}
}

func (d *Deployment) destroy() {
	for _, s := range d.servers {
		s.kill()
	}
}

// GetConfig returns Complement's configuration.
func (d *Deployment) GetConfig() *config.Complement { return d.config }

// RoundTripper sends requests of the tests' own servers to the federation port.
func (d *Deployment) RoundTripper() http.RoundTripper {
	authorities := x509.NewCertPool()
	authorities.AddCert(d.config.CACertificate)
	return federationTripper{&http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: authorities},
		DisableKeepAlives: true,
	}}
}

// federationTripper sends every request over HTTPS to the host in its URL, at the default federation port.
type federationTripper struct{ *http.Transport }

func (f federationTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.URL.Scheme = "https"
	if req.URL.Port() == "" {
		req.URL.Host = net.JoinHostPort(req.URL.Host, federationPort)
	}
	return f.Transport.RoundTrip(req)
}

// Network returns the name of a network for further containers. There is none.
func (d *Deployment) Network() string { return "" }
