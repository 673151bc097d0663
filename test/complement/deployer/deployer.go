// Package deployer runs the homeservers of Complement's tests as processes.
//
// Complement's own deployer makes a Docker container of each homeserver. This one starts a Dendrite binary, stock or with
// expiring events, for each. The binary is what COMPLEMENT_BASE_IMAGE names, and for one server COMPLEMENT_BASE_IMAGE_HS1
// and so on: the variables that name an image for Docker.
//
// The test process runs in mount, network and PID namespaces of its own (isolate.go), which all servers share with it. There
// the only network is loopback, on which the server hsN has the address 127.0.1.N, and the ports 8008 for clients and 8448
// for federation; /etc/hosts knows the servers, and the tests' own federation servers. With the test process end the
// namespace and all that runs in it, however it ends. A server's configuration is the one that Dendrite generates for
// Complement (config.go), but for what must be on disk to survive a restart.
//
// One deployment can run at a time: no test of Complement has two.
package deployer

import (
	"fmt"
	"os"
	"path"
	"testing"

	"github.com/matrix-org/complement/b"
	"github.com/matrix-org/complement/config"
	"github.com/matrix-org/complement/ct"
	"github.com/matrix-org/complement/helpers"
	"github.com/sirupsen/logrus"
)

// Deployer makes deployments.
type Deployer struct {
	config *config.Complement
}

// Run prepares the namespaces that the process is in, hands over a Deployer, runs the tests of a package, and exits.
func Run(m *testing.M, namespace string, ready func(*Deployer)) {
	cfg := config.NewConfigFromEnvVars(namespace, "")
	if err := isolate(cfg.HostnameRunningComplement); err != nil {
		fmt.Fprintln(os.Stderr, "not isolated:", err)
		os.Exit(1)
	}
	// The libraries with which the tests speak to servers log what fails, and tests make much fail.
	logrus.SetLevel(logrus.ErrorLevel)
	ready(&Deployer{config: cfg})
	os.Exit(m.Run())
}

// Servers deploys a number of servers.
func (d *Deployer) Servers(t ct.TestLike, number int) *Deployment {
	t.Helper()
	var blueprint b.Blueprint
	for n := 1; n <= number; n++ {
		blueprint.Homeservers = append(blueprint.Homeservers, b.Homeserver{Name: fmt.Sprintf("hs%d", n)})
	}
	return d.Blueprint(t, blueprint)
}

// Blueprint deploys the servers of a blueprint, with its users and application services. Rooms and account data, which no
// test of Complement asks for, it cannot make.
func (d *Deployer) Blueprint(t ct.TestLike, blueprint b.Blueprint) *Deployment {
	t.Helper()
	dir, err := os.MkdirTemp("", "complement-")
	if err != nil {
		ct.Fatalf(t, "deploying: %s", err)
	}
	deployment := &Deployment{config: d.config, dir: dir, servers: map[string]*server{}, tokens: map[string]string{}}
	complete := false
	defer func() {
		if !complete {
			deployment.destroy()
		}
	}()
	for _, hs := range blueprint.Homeservers {
		if len(hs.Rooms) > 0 {
			ct.Fatalf(t, "blueprint %s: rooms cannot be deployed", blueprint.Name)
		}
		s, err := newServer(d.config, path.Join(dir, hs.Name), hs)
		if err == nil {
			deployment.servers[hs.Name] = s
			err = s.start()
		}
		if err != nil {
			ct.Fatalf(t, "deploying %s: %s", hs.Name, err)
		}
		for _, as := range hs.ApplicationServices {
			deployment.tokens["@"+as.SenderLocalpart+":"+hs.Name] = as.ASToken
		}
		for _, user := range hs.Users {
			c := deployment.register(t, hs.Name, user.Localpart, helpers.RegistrationOpts{})
			if user.DisplayName != "" {
				c.MustSetDisplayName(t, user.DisplayName)
			}
		}
	}
	complete = true
	return deployment
}
