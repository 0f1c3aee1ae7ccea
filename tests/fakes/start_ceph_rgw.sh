#!/bin/bash
# A one-node Ceph object store on loopback: a real S3 server for tests, without containers. About 14 s to start, 250 MB.
# usage: start_ceph_rgw.sh DIR S3_PORT MONITOR_PORT
# DIR is a new folder (keep its path short: it holds sockets); MONITOR_PORT+10 to +40 must be free too.
# Prints "ready" and runs until its standard input ends, so that it never outlives the tests. Data is in memory only.
# Needs the Debian packages ceph-mon ceph-osd ceph-common radosgw.
set -euo pipefail
dir=$1 s3_port=$2 monitor_port=$3
cluster=$(cat /proc/sys/kernel/random/uuid)
mkdir -p "$dir"/{mon,osd,rgw,run,log}

# ms_*_mode = crc: with the default, radosgw hangs at its start when authentication is off
cat > "$dir/ceph.conf" <<CONF
[global]
fsid = $cluster
mon_initial_members = a
mon_host = [v2:127.0.0.1:$monitor_port]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv4 = true
ms_bind_ipv6 = false
ms_bind_msgr1 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_allow_insecure_global_id_reclaim = true
ms_mon_client_mode = crc
ms_mon_service_mode = crc
ms_mon_cluster_mode = crc
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data_avail_warn = 1
run_dir = $dir/run
admin_socket = $dir/run/\$name.asok
log_file = $dir/log/\$name.log
mon_cluster_log_file = $dir/log/cluster.log
pid_file =
crash_dir = $dir/run
setuser_match_path =
[mon.a]
mon_data = $dir/mon/a
mon_addr = 127.0.0.1:$monitor_port
[osd.0]
osd_data = $dir/osd
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_journal_size = 100
ms_bind_port_min = $((monitor_port + 10))
ms_bind_port_max = $((monitor_port + 40))
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:$s3_port
rgw_data = $dir/rgw
rgw_zone = default
rgw_enable_usage_log = false
rgw_run_sync_thread = false
CONF
export CEPH_CONF=$dir/ceph.conf
exec 3>&1 1>"$dir/log/start.log" 2>&1

daemons=()
trap 'kill -9 "${daemons[@]}" 2>/dev/null; wait' EXIT
daemon() {
    "$@" < /dev/null 3>&- &
    daemons+=($!)
}

monmaptool --create --addv a "[v2:127.0.0.1:$monitor_port]" --fsid "$cluster" "$dir/monmap"
ceph-mon --mkfs -i a --monmap "$dir/monmap"
daemon ceph-mon -f -i a
ceph-osd -i 0 --mkfs --osd-uuid "$(cat /proc/sys/kernel/random/uuid)"
ceph --connect-timeout 20 osd create
ceph osd crush add osd.0 1.0 host=localhost root=default
daemon ceph-osd -f -i 0
daemon radosgw -f -n client.rgw --rgw-zone=default

answered=
for _ in $(seq 300); do
    if (exec 4<> "/dev/tcp/127.0.0.1/$s3_port") 2>/dev/null; then answered=yes; break; fi
    sleep 0.2
done
[ "$answered" ]
radosgw-admin user create --uid=tests --display-name=tests --access-key=AKtests --secret-key=SKtests
echo ready >&3
cat > /dev/null
